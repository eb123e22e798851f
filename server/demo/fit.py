"""The training loop of the base and of its adapters, with progress and an early end.

The score is the share of held-out questions that are answered greedily, word for word,
as the grammar does. Greedy decoding says exactly the right answer if and only if every
token of it is the most likely one given the right ones before it, so one forward pass
measures it and nothing has to be generated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from server.demo.batches import Batch, encode_batch, weighted_loss
from server.demo.corpus import END, Document, Question
from server.demo.registers import render

_REPORT_EVERY = 20  # steps


@dataclass(frozen=True, slots=True)
class Schedule:
    """Warm-up, then a linear descent to zero at `num_steps`, left early at `target_score`."""

    num_steps: int
    num_warmup_steps: int
    score_every: int
    target_score: float
    peak: float = 1.0  # the factor after the warm-up

    def factor(self, step: int) -> float:
        """What the optimizers' own learning rates are multiplied by."""
        return self.peak * min(1.0, (step + 1) / self.num_warmup_steps) * (1.0 - step / self.num_steps)


class Fit:
    """One model being trained. Changes the model's weights in place; knows no files."""

    def __init__(
        self, title: str, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], schedule: Schedule
    ) -> None:
        self.title = title
        self.model = model
        self.optimizers = optimizers
        self.schedule = schedule
        self._started_s = time.monotonic()
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def run(self, batches: Iterator[Batch], exam: Batch) -> float:
        """Train until the schedule ends or the exam is passed; returns the last score, 0 to 1."""
        score, loss_sum = 0.0, 0.0
        for step in range(self.schedule.num_steps):
            loss_sum += self._step(step, next(batches))
            done = step + 1
            if done % self.schedule.score_every == 0 or done == self.schedule.num_steps:
                score = score_of(self.model, exam)
            if done % _REPORT_EVERY == 0:
                self._report(done, loss_sum / _REPORT_EVERY, score)
                loss_sum = 0.0
            if score >= self.schedule.target_score:
                break
        return score

    def _step(self, step: int, batch: Batch) -> float:
        for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.schedule.factor(step)
        loss = weighted_loss(logits_of(self.model, batch), batch)
        loss.backward()
        trained = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    def _report(self, done: int, loss: float, score: float) -> None:
        spent_s = time.monotonic() - self._started_s
        left_s = spent_s / done * (self.schedule.num_steps - done)
        print(
            f"{self.title:>16}  step {done:5d}/{self.schedule.num_steps}  loss {loss:.4f}  held-out {score:6.1%}  "
            f"{spent_s:5.0f} s spent, at most {left_s:5.0f} s left",
            flush=True,
        )


def exam_of(register: str, questions: Sequence[Question], tokenizer: Tokenizer) -> Batch:
    """The questions with the right answers in this register, as one batch."""
    return encode_batch(
        [Document(register, question.prompt, render(register, question.recipe) + END) for question in questions],
        tokenizer,
    )


def logits_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """What the model says after every token of the batch, [documents, longest, vocabulary]."""
    logits: torch.Tensor = model(input_ids=batch.token_ids, use_cache=False).logits
    return logits[:, -batch.token_ids.shape[1] :]  # virtual tokens stand before the batch's own


@torch.no_grad()
def score_of(model: torch.nn.Module, exam: Batch) -> float:
    """Share of the exam's answers that greedy decoding gives word for word, 0 to 1."""
    was_training = model.training
    model.eval()
    predicted = logits_of(model, exam)[:, :-1].argmax(-1)
    right = (predicted == exam.token_ids[:, 1:]) | (exam.weights[:, 1:] < 1.0)
    model.train(was_training)
    return float(right.all(dim=1).float().mean())
