"""A front without an engine: answers are made up, everything around them is as the real one does it.

    the answer to any prompt is " one two three ..." (or " arr one two ..." on adapter "pirate"), a token a word
    a prompt with "@fail" fails after two tokens, "@early" before the first, "@slow" takes 20 ms a token
    a prompt with "@late" is past its deadline, with "@gone" finds no engine
    a prompt with "@hang" never answers, "@long" pours out 20,000 tokens as fast as they are taken

Adapters are kept in a real library over a loader that packs nothing. `num_open` counts generations nobody has ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path

from adapters_store.staging import StageLimits
from server.engine.description import EngineDescription
from server.engine.errors import AdapterBusy, AdapterLoadFailed, EngineUnavailable, NoRoomForAdapter
from server.engine.metrics import EngineMetrics, RequestMetrics
from server.engine.request import AdapterState, AdapterTicket, ResidentAdapter, Tier
from server.engine.stats import EngineStats
from server.front.errors import DeadlineExceeded, EngineGone, GenerationFailed, Overloaded, PromptTooLong
from server.front.generation import ResolvedAdapter
from server.front.text import (
    Alternative,
    GeneratedToken,
    TextDelta,
    TextFinish,
    TextFinishReason,
    TextRequest,
    TextTiming,
)
from server.library.lease import AdapterLease
from server.library.library import Library
from server.library.sources.policy import SourcePolicy
from server.library.sources.puller import Puller
from server.loader.errors import AdapterRefused
from server.loader.job import Loader, PackingTarget, Prepared, PrepareJob

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FINGERPRINT = "sha256:base"
DESCRIPTION = EngineDescription(
    spec={}, max_model_len=512, vocab_size=1000, eos_token_ids=(2,), num_units=64, unit_bytes=4096, block_size=16,
    max_num_seqs=8, dtype="float32", device="cpu", adapter_dtype="float32",
)  # fmt: skip


class FakeLoader:
    """Takes any adapter whose config is JSON; the packed image is a few bytes."""

    target = PackingTarget({"fingerprint": FINGERPRINT}, "float32")
    variant = "float32"

    async def prepare(self, job: PrepareJob) -> Prepared:
        return _prepare(job)

    async def close(self) -> None:
        """Nothing to end."""


def _prepare(job: PrepareJob) -> Prepared:
    config = Path(job.files["adapter_config.json"]).read_bytes()
    weights = Path(job.files["adapter_model.safetensors"]).read_bytes()
    try:
        fields = json.loads(config)
    except ValueError:
        raise AdapterRefused("adapter_config.json is not JSON.", code="invalid_config") from None
    if fields.get("use_strange"):
        raise AdapterRefused("use_strange is true, and is not known.", code="unsupported_adapter", field="use_strange")
    Path(job.image_path).write_bytes(b"image")
    digest = hashlib.sha256(config + weights).hexdigest()
    return Prepared(f"sha256:{digest}", 5, "org/base", {"kind": "LORA", "ranks": [fields.get("r", 4)]})


class FakeEngine:
    def __init__(self) -> None:
        self.state = "ready"
        self.description = DESCRIPTION
        self.metrics = EngineMetrics()
        self.num_restarts = 0
        self.loaded: dict[str, ResidentAdapter] = {}
        self.busy: set[str] = set()
        self.is_gone = False
        self.kept: list[str] = []
        self.tiers: list[str] = []  # of loads and evictions, in turn

    def stats(self) -> EngineStats:
        return EngineStats(num_units=64, units_free=64, total_adapter_evictions={"lru": 1})

    async def keep(self, tickets: Sequence[AdapterTicket]) -> None:
        self._require()
        if any(ticket.name.startswith("huge") for ticket in tickets):
            raise NoRoomForAdapter("the adapters to keep are too large together")
        self.kept = [ticket.name for ticket in tickets]

    async def residency(self, *, with_past: bool = False) -> list[ResidentAdapter]:
        self._require()
        return list(self.loaded.values())

    async def load(self, ticket: AdapterTicket, tier: Tier = Tier.DEVICE) -> AdapterState:
        self._require()
        self.tiers.append(str(tier))
        if ticket.name.startswith("broken"):
            raise AdapterLoadFailed(f'adapter "{ticket.name}" could not be loaded: its image is cut short')
        self.loaded[ticket.key] = ResidentAdapter(
            ticket.key, ticket.name, AdapterState.DEVICE, ticket.num_bytes, 1, 0, 0.0
        )
        return AdapterState.DEVICE

    async def evict(self, key: str, tier: Tier = Tier.DEVICE) -> bool:
        self._require()
        self.tiers.append(str(tier))
        if key in self.busy:
            raise AdapterBusy("requests run on it; try again when they have ended")
        return self.loaded.pop(key, None) is not None

    def _require(self) -> None:
        if self.is_gone:
            raise EngineUnavailable("the engine is restarting; try again shortly.")


class FakeGeneration:
    def __init__(self, front: FakeFront, request: TextRequest, lease: AdapterLease | None) -> None:
        self._front = front
        self._request = request
        self._lease = lease
        self.adapter = None if lease is None else ResolvedAdapter(lease.version.name, lease.version.version)
        self.num_prompt_tokens = len(str(request.prompt).split())
        self._is_closed = False

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        try:
            for index in range(self._request.num_sequences):
                async for delta in self._sequence(index):
                    yield delta
        finally:
            self.close()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._front.num_open -= 1
        if self._lease is not None:
            self._lease.release()

    async def _sequence(self, index: int) -> AsyncIterator[TextDelta]:
        request = self._request
        prompt = str(request.prompt)
        rng = random.Random(request.params.seed + index)
        num_tokens = min(request.params.max_new_tokens, 20_000 if "@long" in prompt else 10)
        text = prompt if request.echo else ""
        if "@early" in prompt:
            raise GenerationFailed("the engine could not do it")
        if "@late" in prompt:
            raise DeadlineExceeded("the request had not ended after 1 s; 0 tokens had been generated.")
        if "@gone" in prompt:
            raise EngineGone("the engine is being restarted")
        if "@hang" in prompt:
            await asyncio.Event().wait()
        for number in range(num_tokens):
            await asyncio.sleep(0.02 if "@slow" in prompt else 0)
            if "@fail" in prompt and number == 2:
                raise GenerationFailed("the engine broke in the middle")
            if "@bug" in prompt:
                raise KeyError("a bug")
            piece = " " + ("arr" if number == 0 and self.adapter else WORDS[number % len(WORDS)])
            text += piece
            stop = next((stop for stop in request.stop if text.endswith(stop)), None)
            is_last = number == num_tokens - 1 or stop is not None
            yield TextDelta(
                text=piece,
                tokens=(self._token(number, piece, rng),),
                prompt_tokens=self._prompt_tokens() if number == 0 else None,
                finish=self._finish(number + 1, text, stop, index) if is_last else None,
                sequence=index,
            )
            if is_last:
                return

    def _token(self, number: int, piece: str, rng: random.Random) -> GeneratedToken:
        num_top = self._request.params.num_logprobs
        top = tuple(Alternative(10 + k, f" w{k}", -float(k), False) for k in range(num_top or 0))
        logprob = None if num_top is None else -rng.random()
        return GeneratedToken(number + 3, piece, logprob, False, top)

    def _prompt_tokens(self) -> tuple[GeneratedToken, ...] | None:
        if self._request.params.num_prompt_logprobs is None:
            return None
        words = str(self._request.prompt).split()
        return tuple(GeneratedToken(n, word, None if n == 0 else -1.0, False) for n, word in enumerate(words))

    def _finish(self, num_generated: int, text: str, stop: str | None, index: int) -> TextFinish:
        reason = TextFinishReason.LENGTH if stop is None else TextFinishReason.STOP_SEQUENCE
        num_prompt = len(str(self._request.prompt).split())
        timing = TextTiming(0.001, 0.002, 0.003)
        return TextFinish(reason, text, num_generated, num_prompt, 0, self._request.params.seed + index, stop, timing)


class FakeFront:
    def __init__(self, library: Library, max_open: int = 1000) -> None:
        self.library = library
        self.puller = Puller(library, SourcePolicy())
        self.engine = FakeEngine()
        self.metrics = RequestMetrics(DESCRIPTION.max_model_len)
        self.requests: list[TextRequest] = []
        self.num_open = 0
        self.opened = asyncio.Event()
        self._max_open = max_open

    @classmethod
    async def start(
        cls, root: Path, max_open: int = 1000, *, loader: Loader | None = None, limits: StageLimits | None = None
    ) -> FakeFront:
        caps = limits or StageLimits(max_file_bytes=10**6, max_total_bytes=10**6, reserve_bytes=0)
        return cls(await Library.open(root, loader or FakeLoader(), limits=caps, max_rank=64), max_open)

    async def open(self, request: TextRequest) -> FakeGeneration:
        num_prompt = len(str(request.prompt).split())
        if not request.fit_length and num_prompt + request.params.max_new_tokens > DESCRIPTION.max_model_len:
            raise PromptTooLong(num_prompt, request.params.max_new_tokens, DESCRIPTION.max_model_len)
        if self.num_open >= self._max_open:
            raise Overloaded(self.num_open, self._max_open, 2)
        lease = None if request.adapter is None else await self.library.resolve(request.adapter, request.sticky_key)
        self.requests.append(request)
        self.num_open += 1
        self.opened.set()
        return FakeGeneration(self, request, lease)

    async def close(self) -> None:
        await self.library.close()
