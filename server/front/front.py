"""The composition root of the front process: engine, library and tokenizer behind one `open`.

    front = await Front.start(settings)
    generation = await front.open(TextRequest("SELECT", SamplingParams(16), adapter="sql"))
    async for delta in generation.deltas(): ...
    await front.drain(30.0); await front.close()

A request is resolved, tokenised, checked and queued in `open`; whatever can be refused is refused there.
It knows neither HTTP nor how a model computes.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import NamedTuple, Protocol

from adapters_store.errors import StoreError
from peft_core.traits import AdapterTraits
from server.engine.client import EngineClient, OnEvent
from server.engine.errors import EngineError, EngineUnavailable
from server.engine.launch import Launch
from server.engine.metrics import RequestMetrics
from server.engine.request import EngineRequest, SamplingParams
from server.front import opening
from server.front.errors import CannotStart, EngineGone, InvalidRequest, Overloaded, PromptTooLong
from server.front.generation import AdapterLease, Generation
from server.front.image_care import ImageCare
from server.front.sequence_text import SequenceText
from server.front.text import TextDelta, TextRequest
from server.front.tokenizer import TextTokenizer
from server.front.vocabularies import Vocabularies
from server.front.warm_start import WarmStart
from server.library.errors import LibraryError
from server.library.library import Library
from server.library.sources.auto_load import AutoLoader
from server.library.sources.puller import Puller
from server.loader.client import LoaderClient
from server.loader.errors import LoaderError
from server.settings import Settings

_LONGEST_RETRY_S = 60


class Resolver(Protocol):
    """The part of the library that a request needs."""

    async def resolve(self, reference: str, key: str | None = None) -> AdapterLease: ...


class Prompt(NamedTuple):
    token_ids: tuple[int, ...]
    text: str


class Front:
    """Belongs to one event loop. `metrics` count finished requests, `engine.metrics` tokens as they pass."""

    library: Library
    puller: Puller

    def __init__(
        self, engine: EngineClient, resolver: Resolver, tokenizer: TextTokenizer, *, max_queued_requests: int = 256
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.metrics = RequestMetrics(engine.description.max_model_len)
        self._resolver = resolver
        self._vocabularies = Vocabularies(tokenizer)
        self._max_queued_requests = max_queued_requests
        self._numbers = itertools.count()
        self._warm: WarmStart | None = None
        self._closing = AsyncExitStack()

    @classmethod
    async def start(cls, settings: Settings, *, on_event: OnEvent | None = None, launch: Launch | None = None) -> Front:
        """Start the engine and the loader, open the store, register the adapters that the settings name.

        Raises:
            CannotStart: with the reason, in the words of whoever could not.
        """
        try:
            return await cls._start(settings, on_event or (lambda event: None), launch)
        except (EngineError, StoreError, LibraryError, LoaderError) as error:
            raise CannotStart(str(error)) from error

    @classmethod
    async def _start(cls, settings: Settings, on_event: OnEvent, launch: Launch | None) -> Front:
        await opening.check_paths(settings)
        async with AsyncExitStack() as started:
            loader = await LoaderClient.launch()  # it imports what it needs while the base is loaded
            started.push_async_callback(loader.close)
            tokenizer = asyncio.create_task(TextTokenizer.load(opening.model_of(settings), settings.revision))
            care = ImageCare(on_event)
            try:
                config = opening.engine_config(settings)
                engine = await EngineClient.start(config, on_event=care.on_event, launch=launch)
                started.push_async_callback(engine.close)
                library = await opening.open_library(settings, engine, loader)
                started.push_async_callback(library.close)
                puller = Puller(library, opening.source_policy(settings))
                await opening.register_adapters(library, puller, settings, on_event)
                started.push_async_callback(care.close)
                care.start(engine, library, settings.image_cache_bytes)
                warm = await opening.warm_up(engine, library, on_event)
                resolver = AutoLoader(library, puller)
                started.push_async_callback(resolver.close)
                front = cls(engine, resolver, await tokenizer, max_queued_requests=settings.max_queued_requests)
            finally:
                tokenizer.cancel()
                await asyncio.gather(tokenizer, return_exceptions=True)
            front.library, front.puller = library, puller
            front._warm = warm
            front._closing = started.pop_all()
            return front

    async def open(self, request: TextRequest) -> Generation:
        """Accept one request; from here on it ends in exactly one of finished, aborted, failed.

        Raises:
            InvalidRequest, PromptTooLong: it can never work as it stands.
            Overloaded, EngineGone: try again.
            Errors of the library: its adapter is unknown or unusable.
        """
        self._require_room(request.num_sequences)
        _check(request)
        lease = await self._lease(request)
        try:
            traits = AdapterTraits() if lease is None else lease.ticket.traits
            if lease is not None and not traits.invocation_tokens:  # whether it is invoked, the prompt's tokens tell
                self.engine.expect(lease.ticket)
            _check_task(request, traits)
            tokenizer = await self._vocabularies.of(None if lease is None else lease.report)
            prompt = await self._prompt_of(request, traits, tokenizer)
            params = self._fitting_params(request, len(prompt.token_ids), traits.num_virtual_tokens)
            request = replace(request, params=params)
            self._require_room(request.num_sequences)
            sequences = self._submit(request, prompt, lease, tokenizer)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        return Generation(request, sequences, lease, self.metrics, len(prompt.token_ids))

    async def generate(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """`open` and `deltas` in one; raises what they raise."""
        generation = await self.open(request)
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                yield delta

    async def drain(self, timeout_s: float) -> int:
        """Accept nothing more and wait for what runs; how many sequences had not ended in time."""
        return await self.engine.drain(timeout_s)

    async def close(self) -> None:
        """End engine, loader and store; what still runs fails. Again is harmless."""
        if self._warm is not None:
            await self._warm.close()
        await self.engine.close()
        await self._closing.aclose()

    async def _lease(self, request: TextRequest) -> AdapterLease | None:
        if request.adapter is None:
            return None
        return await self._resolver.resolve(request.adapter, request.sticky_key)

    async def _prompt_of(self, request: TextRequest, traits: AdapterTraits, tokenizer: TextTokenizer) -> Prompt:
        if isinstance(request.prompt, str):
            text = request.prompt
            token_ids = tuple(await tokenizer.encode(text, request.add_special_tokens))
        else:
            token_ids = tuple(request.prompt)
            vocab_size = max(self.engine.description.vocab_size, traits.vocab_size or 0)
            wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
            if wrong is not None:
                raise InvalidRequest(f"the prompt holds token id {wrong}; the model's ids are 0 to {vocab_size - 1}.")
            text = tokenizer.decode(token_ids) if request.echo else ""
        if request.truncate is not None:
            token_ids = token_ids[-request.truncate :]
        if not token_ids:
            raise InvalidRequest("the prompt is empty; it must give at least one token.")
        return Prompt(token_ids, text)

    def _fitting_params(self, request: TextRequest, num_prompt_tokens: int, num_virtual: int) -> SamplingParams:
        params, max_model_len = request.params, self.engine.description.max_model_len
        room = max_model_len - num_virtual - num_prompt_tokens
        if params.max_new_tokens <= room:
            return params
        if room < 1 or not request.fit_length:
            wanted = 1 if request.fit_length else params.max_new_tokens
            raise PromptTooLong(num_prompt_tokens, wanted, max_model_len, num_virtual)
        return replace(params, max_new_tokens=room, min_new_tokens=min(params.min_new_tokens, room))

    def _submit(
        self, request: TextRequest, prompt: Prompt, lease: AdapterLease | None, tokenizer: TextTokenizer
    ) -> list[SequenceText]:
        sequences: list[SequenceText] = []
        name = f"{request.request_id or 'request'}#{next(self._numbers)}"
        try:
            for index in range(request.num_sequences):
                asked = EngineRequest(
                    request_id=f"{name}.{index}",
                    token_ids=prompt.token_ids,
                    params=replace(request.params, seed=request.params.seed + index),
                    adapter=None if lease is None else lease.ticket,
                    cache_salt=request.cache_salt,
                    deadline_s=request.deadline_s,
                    task_id=request.task_id,
                )
                stream = self.engine.submit(asked)
                sequences.append(SequenceText(request, prompt.token_ids, prompt.text, stream, tokenizer, index))
        except EngineUnavailable as error:
            for sequence in sequences:
                sequence.stream.leave()
            raise EngineGone(str(error)) from error
        return sequences

    def _require_room(self, num_sequences: int) -> None:
        max_num_seqs = self.engine.description.max_num_seqs
        num_queued = max(0, self.engine.num_in_flight - max_num_seqs)
        if self.engine.num_in_flight + num_sequences <= max_num_seqs + self._max_queued_requests:
            return
        self.metrics.num_rejected += 1
        mean_s = self.metrics.total_s.total / max(1, self.metrics.total_s.count)
        retry_after_s = min(_LONGEST_RETRY_S, max(1, math.ceil(mean_s * num_queued / max_num_seqs)))
        raise Overloaded(num_queued, self._max_queued_requests, retry_after_s)


def _check_task(request: TextRequest, traits: AdapterTraits) -> None:
    """An adapter of several tasks needs one named; nobody else takes one."""
    if not traits.num_tasks:
        if request.task_id is not None:
            whose = "the base model" if request.adapter is None else f"adapter {request.adapter!r}"
            raise InvalidRequest(f"task_id is {request.task_id}, and {whose} has no tasks; leave it out.")
        return
    known = f"adapter {request.adapter!r} was trained on {traits.num_tasks} tasks"
    if request.task_id is None:
        raise InvalidRequest(f"{known}: say which with task_id, 0 to {traits.num_tasks - 1}.")
    if not 0 <= request.task_id < traits.num_tasks:
        raise InvalidRequest(f"task_id is {request.task_id}; {known}, 0 to {traits.num_tasks - 1}.")


def _check(request: TextRequest) -> None:
    if not request.prompt:
        raise InvalidRequest("the prompt is empty; it must hold at least one character or token.")
    if request.params.max_new_tokens < 1:
        raise InvalidRequest(f"max_new_tokens is {request.params.max_new_tokens}, and must be at least 1.")
    if request.truncate is not None and request.truncate < 1:
        raise InvalidRequest(f"truncate is {request.truncate}, and must be at least 1.")
    if request.num_sequences < 1:
        raise InvalidRequest(f"the number of sequences is {request.num_sequences}, and must be at least 1.")
    if not all(request.stop):
        raise InvalidRequest("a stop string is empty; it would stop every answer at once.")
