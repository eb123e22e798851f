"""Streams that never pause while an operator turns everything over: who asked what, who meant what when, who answered.

operator   uploads versions, moves, shares and rolls back aliases, evicts, deletes, uploads again under the same name
asker      asks and asks again; keeps of each answer the version that it named and its tokens
timeline   which versions a reference could mean between two moments
judge      says what is wrong with an answer: a version that was not meant, or tokens that are not that version's
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx

ADMIN = "/admin/v1/adapters"
NUM_TOKENS = 24
MAIN, GONE, STILL = "swap", "gone", "still"  # turned over; deleted and uploaded again; left alone
REFERENCES = (MAIN, f"{MAIN}@prod", GONE, STILL)


class Span(NamedTuple):
    """A reference could mean these versions, or nothing, from one moment to another (seconds, monotonic)."""

    versions: frozenset[int]
    from_s: float
    until_s: float


@dataclass
class Timeline:
    """What references meant. A change is uncertain from its call to its answer, and both meanings are possible then."""

    spans: dict[str, list[Span]] = field(default_factory=dict)

    def change(self, reference: str, versions: set[int], called_s: float) -> None:
        spans = self.spans.setdefault(reference, [])
        if spans:
            spans[-1] = spans[-1]._replace(until_s=time.monotonic())
        spans.append(Span(frozenset(versions), called_s, float("inf")))

    def now(self, reference: str) -> frozenset[int]:
        return self.spans[reference][-1].versions

    def possible(self, reference: str, from_s: float, until_s: float) -> list[Span]:
        return [span for span in self.spans[reference] if span.from_s <= until_s and from_s <= span.until_s]


class Answer(NamedTuple):
    reference: str
    prompt: int  # which of the prompts
    status: int
    version: int | None  # that the response named
    tokens: tuple[int, ...]
    asked_s: float
    began_s: float  # when the response's headers came
    ended_s: float
    error: str = ""


class Oracle(NamedTuple):
    """Tokens by weights and prompt: what the library that wrote the weights answers."""

    prompts: Sequence[str]
    tokens: Sequence[Sequence[tuple[int, ...]]]


def wrong(answer: Answer, timeline: Timeline, weights: Mapping[tuple[str, int], int], oracle: Oracle) -> str | None:
    """What is wrong with an answer, in a sentence."""
    spans = timeline.possible(answer.reference, answer.asked_s, answer.began_s)
    if answer.status == 404:
        return None if any(not span.versions for span in spans) else f"not found, though it was there: {answer}"
    if answer.status != 200 or answer.error:
        return f"failed: {answer}"
    if answer.version is None or all(answer.version not in span.versions for span in spans):
        return f"{answer} names a version that was not meant; possible: {spans}"
    name = answer.reference.partition("@")[0]
    expected = oracle.tokens[weights[name, answer.version]][answer.prompt]
    if answer.tokens != expected:
        given_by = [number for number, row in enumerate(oracle.tokens) if row[answer.prompt] == answer.tokens]
        return f"{answer} is not what version {answer.version} gives; it is what weights {given_by} give"
    return None


class Asker:
    """One stream after another on references in turn, until `stop`."""

    def __init__(self, client: httpx.AsyncClient, oracle: Oracle, seed: int) -> None:
        self._client = client
        self._oracle = oracle
        self._random = random.Random(seed)
        self.answers: list[Answer] = []

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            reference = self._random.choice(REFERENCES)
            prompt = self._random.randrange(len(self._oracle.prompts))
            self.answers.append(await self._ask(reference, prompt))

    async def _ask(self, reference: str, prompt: int) -> Answer:
        parameters = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True}
        body = {"inputs": self._oracle.prompts[prompt], "adapter": reference, "parameters": parameters}
        asked_s = time.monotonic()
        tokens, error = [], ""
        async with self._client.stream("POST", "/generate_stream", json=body) as response:
            began_s = time.monotonic()
            async for line in response.aiter_lines():
                event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                error = event.get("error", error)
                if "token" in event:
                    tokens.append(event["token"]["id"])
        version = response.headers.get("x-adapter-version")
        number = None if version is None else int(version)
        times = (asked_s, began_s, time.monotonic())
        return Answer(reference, prompt, response.status_code, number, tuple(tokens), *times, error)


class Operator:
    """Changes something every few hundredths of a second. `weights` says which weights a version has."""

    def __init__(self, client: httpx.AsyncClient, contents: Sequence[Path], seed: int = 0) -> None:
        self._client = client
        self._contents = contents
        self._random = random.Random(seed)
        self._live: set[int] = set()  # versions of MAIN
        self._num_uploads = 0
        self.timeline = Timeline()
        self.weights: dict[tuple[str, int], int] = {}
        self.done: Counter[str] = Counter()

    async def prepare(self) -> None:
        for name in (MAIN, GONE, STILL):
            await self._upload(name)
        await self._move_alias()
        self.done.clear()

    async def run(self, stop: asyncio.Event) -> None:
        acts: list[Callable[[], Awaitable[None]]] = [
            self._upload_main,
            self._move_alias,
            self._share_alias,
            self._roll_back,
            self._evict,
            self._delete_version,
            self._delete_and_upload_again,
        ]
        while not stop.is_set():
            self._random.shuffle(acts)
            for act in acts:
                await act()
                await asyncio.sleep(0.02)

    async def _upload_main(self) -> None:
        await self._upload(MAIN, promote=self._random.random() < 0.7)

    async def _upload(self, name: str, *, promote: bool = True) -> None:
        """The same weights come often, each time in other bytes, so that each is a version of its own."""
        number = self._random.randrange(len(self._contents))
        self._num_uploads += 1
        config = json.loads((self._contents[number] / "adapter_config.json").read_text())
        parts: list[Any] = [
            ("metadata", (None, json.dumps({"name": name, "promote": promote}))),
            ("files", ("adapter_config.json", json.dumps(config) + " " * self._num_uploads)),
            (
                "files",
                ("adapter_model.safetensors", (self._contents[number] / "adapter_model.safetensors").read_bytes()),
            ),
        ]
        called_s = time.monotonic()
        answer = await self._client.post(ADMIN, files=parts)
        assert answer.status_code == 201, answer.text
        version = answer.json()["version"]
        assert (name, version) not in self.weights, "a number was given out twice"
        self.weights[name, version] = number
        if name == MAIN:
            self._live.add(version)
        if promote:
            self.timeline.change(name, {version}, called_s)
        self.done["upload"] += 1

    async def _set_prod(self, method: str, path: str, body: dict[str, Any] | None, what: str) -> None:
        called_s = time.monotonic()
        answer = await self._client.request(method, f"{ADMIN}/{MAIN}/aliases/prod{path}", json=body)
        if what == "rollback" and answer.status_code in (404, 409):
            return  # everything earlier is deleted
        assert answer.status_code == 200, answer.text
        shown = await self._client.get(f"{ADMIN}/{MAIN}/aliases/prod")
        self.timeline.change(f"{MAIN}@prod", {int(version) for version in shown.json()["weights"]}, called_s)
        self.done[what] += 1

    async def _move_alias(self) -> None:
        await self._set_prod("PUT", "", {"version": self._random.choice(sorted(self._live))}, "move")

    async def _share_alias(self) -> None:
        chosen = self._random.sample(sorted(self._live), min(2, len(self._live)))
        await self._set_prod("PUT", "", {"weights": {str(version): 50 for version in chosen}}, "share")

    async def _roll_back(self) -> None:
        await self._set_prod("POST", "/rollback", None, "rollback")

    async def _evict(self) -> None:
        """Refused for what running requests stand on; whatever is free goes."""
        orders = [(MAIN, {"version": version}) for version in sorted(self._live)] + [(GONE, {}), (STILL, {})]
        for name, order in orders:
            answer = await self._client.post(f"{ADMIN}/{name}/unload", json=order)
            assert answer.status_code in (200, 409), answer.text
            self.done["evict" if answer.status_code == 200 else "evict refused"] += 1

    async def _delete_version(self) -> None:
        unmeant = self._live - self.timeline.now(MAIN) - self.timeline.now(f"{MAIN}@prod")
        if len(unmeant) < 2:
            return
        version = self._random.choice(sorted(unmeant))
        answer = await self._client.delete(f"{ADMIN}/{MAIN}/versions/{version}?drain_timeout_s=0")
        assert answer.status_code == 204, answer.text
        self._live.remove(version)
        self.done["delete version"] += 1
        self.done["delete under requests"] += answer.headers["x-requests-left"] != "0"

    async def _delete_and_upload_again(self) -> None:
        called_s = time.monotonic()
        answer = await self._client.delete(f"{ADMIN}/{GONE}?drain_timeout_s=0")
        assert answer.status_code == 204, answer.text
        self.timeline.change(GONE, set(), called_s)
        self.done["delete"] += 1
        self.done["delete under requests"] += answer.headers["x-requests-left"] != "0"
        await self._upload(GONE)
