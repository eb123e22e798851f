"""Swap under fire: every answer is one committed version's, whatever is done to the adapters meanwhile."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch

from tests.clients.fire import NUM_TOKENS, Answer, Asker, Operator, Oracle, Timeline, wrong
from tests.clients.running import RunningServer, is_idle
from tests.clients.served_model import VOCAB, make_served_model
from tests.tiny_models import attention_targets, load_oracle, make_lora, make_model

NUM_WEIGHTS = 4
ACTS = ("upload", "move", "share", "rollback", "evict", "delete version", "delete", "delete under requests")
_PATIENCE_S = 60.0
_LEAST_MARGIN = 1e-3  # between the two best logits; below it rounding could choose
# Longer than two blocks and alike to the end, so that K/V of other weights would be found if it could be.
_WORDS = ("and", "then", "or", "but", "so", "as", "if")
_CANDIDATES = [f"Preheat the oven and wait until all of it is hot, {word}" for word in _WORDS]


class Stage(NamedTuple):
    base: Path
    contents: list[Path]  # weights to upload
    oracle: Oracle


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    root = tmp_path_factory.mktemp("fire")
    base = make_served_model(root).base
    model = make_model("llama", seed=1, vocab_size=VOCAB)
    targets = attention_targets("llama")
    contents = [
        make_lora(model, root / f"weights{number}", rank=2 + 3 * number, alpha=32, targets=targets, seed=20 + number)
        for number in range(NUM_WEIGHTS)
    ]
    rows = [greedy(load_oracle(model, directory)) for directory in contents]
    certain = [index for index in range(len(_CANDIDATES)) if all(row[index][1] > _LEAST_MARGIN for row in rows)][:3]
    assert len(certain) >= 2, "too few prompts whose answers are beyond rounding"
    oracle = Oracle([_CANDIDATES[index] for index in certain], [[row[index][0] for index in certain] for row in rows])
    for prompt in range(len(certain)):
        assert len({row[prompt] for row in oracle.tokens}) == NUM_WEIGHTS, "weights must answer differently"
    return Stage(base, contents, oracle)


def greedy(model: Any) -> list[tuple[tuple[int, ...], float]]:
    """PEFT's own answer to each candidate, and how far the best token stood out at least."""
    answers = []
    for prompt in _CANDIDATES:
        ids, margin = list(prompt.encode()), float("inf")
        for _ in range(NUM_TOKENS):
            with torch.no_grad():
                best = model(torch.tensor([ids])).logits[0, -1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            ids.append(int(best.indices[0]))
        answers.append((tuple(ids[-NUM_TOKENS:]), margin))
    return answers


async def fire(url: str, stage: Stage, num_streams: int, seconds: float) -> tuple[Operator, list[Answer]]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        operator, stop = Operator(client, stage.contents), asyncio.Event()
        await operator.prepare()
        askers = [Asker(client, stage.oracle, seed) for seed in range(num_streams)]
        running = asyncio.gather(operator.run(stop), *(asker.run(stop) for asker in askers))
        deadline_s = time.monotonic() + seconds + _PATIENCE_S
        await asyncio.wait([running], timeout=seconds)
        while not (running.done() or all(operator.done[act] for act in ACTS) or time.monotonic() > deadline_s):
            await asyncio.wait([running], timeout=0.2)  # a busy machine needs longer to get round
        stop.set()
        await running
        return operator, [answer for asker in askers for answer in asker.answers]


def swap(stage: Stage, root: Path, num_streams: int, seconds: float) -> tuple[Operator, list[Answer]]:
    """Fire at a server of its own; every answer is right, and nothing is left behind."""
    arguments = [str(stage.base), "--store-dir", str(root / "store"), "--pool-bytes", "8M"]
    with RunningServer(root, arguments) as server:
        operator, answers = asyncio.run(asyncio.wait_for(fire(server.url, stage, num_streams, seconds), seconds + 180))
        assert is_idle(server.wait_until_idle())
        metrics = httpx.get(server.url + "/metrics").text
    problems = [wrong(answer, operator.timeline, operator.weights, stage.oracle) for answer in answers]
    assert [problem for problem in problems if problem is not None][:5] == []
    hits = re.search(r"^veneer_prefix_cache_hits_total ([0-9.e+]+)$", metrics, re.MULTILINE)
    assert hits is not None
    assert float(hits[1]) > 0, "K/V must have been found again for it to be that of the right weights"
    versions = {(answer.reference.partition("@")[0], answer.version) for answer in answers}
    cut = sum(is_overtaken(answer, operator.timeline) for answer in answers)
    num_absent = sum(answer.status == 404 for answer in answers)
    print(
        f"{len(answers)} answers ({num_absent} told that the name was deleted just then) of {len(versions)} versions, "
        f"{cut} ended on a version that was not meant any more; {dict(operator.done)}"
    )
    assert num_absent < len(answers) / 4
    assert all(operator.done[act] for act in ACTS), operator.done
    assert cut > 0, "some must have been overtaken by a change for this to show anything"
    assert len(versions) > NUM_WEIGHTS
    return operator, answers


def is_overtaken(answer: Answer, timeline: Timeline) -> bool:
    """Whether, when it ended, its reference could not mean its version any more."""
    if answer.version is None:
        return False
    spans = timeline.possible(answer.reference, answer.ended_s, answer.ended_s)
    return all(answer.version not in span.versions for span in spans)


def test_every_answer_is_one_versions_while_everything_is_swapped(stage: Stage, tmp_path: Path) -> None:
    swap(stage, tmp_path, num_streams=8, seconds=8.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_answer_is_one_versions_for_two_minutes_of_32_streams(stage: Stage, tmp_path: Path) -> None:
    operator, answers = swap(stage, tmp_path, num_streams=32, seconds=120.0)
    assert len(answers) > 500
    assert operator.done.total() > 50


def test_the_judge_sees_each_kind_of_wrong_answer() -> None:
    oracle = Oracle(["a"], [[(1, 1)], [(2, 2)]])
    weights = {("swap", 1): 0, ("swap", 2): 1}
    timeline = Timeline()
    timeline.change("swap", {1}, 0.0)
    timeline.spans["swap"] = [timeline.spans["swap"][0]._replace(until_s=10.2)]
    timeline.spans["swap"].append(
        timeline.spans["swap"][0]._replace(versions=frozenset({2}), from_s=10.0, until_s=20.0)
    )
    right = Answer("swap", 0, 200, 1, (1, 1), 5.0, 6.0, 12.0)
    assert wrong(right, timeline, weights, oracle) is None
    assert is_overtaken(right, timeline), "it ended on the version that it began with, and another was meant by then"
    for problem, answer in {
        "is not what version 1 gives": right._replace(tokens=(2, 2)),
        "names a version that was not meant": right._replace(version=2, tokens=(2, 2)),
        "though it was there": right._replace(status=404),
        "failed": right._replace(status=503),
        "failed: ": right._replace(error="the engine broke"),
    }.items():
        assert problem in str(wrong(answer, timeline, weights, oracle))
    during_the_move = right._replace(version=2, tokens=(2, 2), asked_s=10.1, began_s=10.1)
    assert wrong(during_the_move, timeline, weights, oracle) is None
    assert wrong(during_the_move._replace(version=1, tokens=(1, 1)), timeline, weights, oracle) is None
    mixed = right._replace(tokens=(1, 2))
    assert "weights []" in str(wrong(mixed, timeline, weights, oracle)), "half of one version and half of another"
