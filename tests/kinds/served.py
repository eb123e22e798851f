"""A running engine with one adapter of every kind, and its answers beside those of PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from peft_core.errors import AdapterError
from server.engine.request import AdapterTicket
from tests.kinds.zoo import ABSENT, INVOCATION, KINDS, TASKS, make_adapter, peft_logits
from tests.tiny_engine import Answer, Ask, TinyEngine, assert_equals_logits
from tests.tiny_models import load_oracle, make_model, random_prompt


@dataclass
class Served:
    """Tickets by kind; `refused` holds what the decoder said of the others."""

    arch: str
    model: PreTrainedModel
    engine: TinyEngine
    directory: Path
    tickets: dict[str, AdapterTicket] = field(default_factory=dict)
    refused: dict[str, AdapterError] = field(default_factory=dict)

    def ask(self, kind: str, prompt: list[int], *, name: str = "", num_tokens: int = 6) -> Ask:
        """`kind` "base" is the base model."""
        name = name or f"{kind}-{len(prompt)}"
        return Ask(name, prompt, self.tickets.get(kind), num_tokens, task_id=TASKS.get(kind))

    def check(self, kind: str, ask: Ask, answer: Answer) -> None:
        """Against the library that wrote the adapter, alone and unpadded."""
        oracle = self.model if kind == "base" else load_oracle(self.model, self.directory / kind)
        assert_equals_logits(ask, answer, peft_logits(kind, oracle, ask.prompt, answer.tokens))


def serve_every_kind(
    arch: str,
    directory: Path,
    *,
    kinds: tuple[str, ...] = tuple(KINDS),
    model: PreTrainedModel | None = None,
    **config: object,
) -> Served:
    """Make and register an adapter of each kind. `model`: one of `arch`; by default a random one."""
    model = make_model(arch, seed=1) if model is None else model
    served = Served(arch, model, TinyEngine(model, directory, **config), directory)
    for index, kind in enumerate(kind for kind in kinds if kind not in ABSENT.get(arch, ())):
        make_adapter(kind, model, arch, directory / kind, seed=index)
        try:
            served.tickets[kind] = served.engine.add(kind, directory / kind)
        except AdapterError as error:
            served.refused[kind] = error
    return served


def prompt_for(kind: str, length: int, *, seed: int = 0) -> list[int]:
    """Random; one that invokes the adapter where the kind needs that, in the middle."""
    prompt = random_prompt(length, seed=seed)
    if kind == "alora" and length > 2 * len(INVOCATION):
        middle = length // 2
        prompt[middle : middle + len(INVOCATION)] = INVOCATION
    return prompt
