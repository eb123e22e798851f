"""The one door to the engine: requests in, deltas out, from one event loop.

Whatever happens to the engine, every accepted request ends: when the engine's process dies its requests
end FAILED and retryable, and until the supervisor has started a new one `submit` raises `EngineUnavailable`.

    client = await EngineClient.start(config)
    async for delta in client.submit(request): ...
    await client.close()
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from server.channel import Message
from server.engine import wire
from server.engine.config import EngineConfig
from server.engine.delta_stream import DeltaStream
from server.engine.description import EngineDescription
from server.engine.errors import AdapterLoadFailed, EngineUnavailable
from server.engine.launch import Launch, in_process
from server.engine.metrics import EngineMetrics
from server.engine.request import (
    AdapterState,
    AdapterTicket,
    EngineErrorRecord,
    EngineRequest,
    FinishReason,
    RequestDelta,
    ResidentAdapter,
    Tier,
)
from server.engine.stats import EngineStats
from server.engine.step import AdapterEvent
from server.engine.supervisor import EngineState, Supervisor


class LoadProgress(NamedTuple):
    stage: str
    fraction: float  # 0..1


class StateChange(NamedTuple):
    state: EngineState
    message: str  # why, for people


# Which loads an event ends. One with a reason that is no failure is an eviction, and ends none.
_ENDS = {"device": (Tier.DEVICE,), "host": (Tier.HOST,), "failed": (Tier.DEVICE, Tier.HOST)}

EngineEvent = LoadProgress | StateChange | AdapterEvent
OnEvent = Callable[[EngineEvent], None]


class EngineClient:
    """Made by `start`. Not thread-safe: it belongs to the event loop that started it."""

    def __init__(self, config: EngineConfig, launch: Launch, on_event: OnEvent | None) -> None:
        self.config = config
        self.metrics = EngineMetrics()
        self._on_event = on_event or (lambda event: None)
        self._loop = asyncio.get_running_loop()
        self._supervisor = Supervisor(config, launch, self)
        self._stats = EngineStats()
        self._streams: dict[str, weakref.ref[DeltaStream]] = {}  # weak: one dropped without a word aborts, too
        self._empty = asyncio.Event()
        self._empty.set()
        self._draining = False
        self._call_numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._loads: dict[tuple[str, Tier], list[asyncio.Future[AdapterEvent]]] = {}
        self._on_device: set[str] = set()  # as far as the engine's events tell
        self._kept: tuple[AdapterTicket, ...] = ()

    @classmethod
    async def start(
        cls, config: EngineConfig, *, on_event: OnEvent | None = None, launch: Launch | None = None
    ) -> EngineClient:
        """Start an engine and wait until it is ready; `on_event` hears of its progress, states and adapters.

        Raises:
            EngineStartError: with the engine's own words.
        """
        client = cls(config, launch or in_process(), on_event)
        await client._supervisor.start()
        return client

    @property
    def description(self) -> EngineDescription:
        return self._supervisor.description

    @property
    def state(self) -> EngineState:
        return self._supervisor.state

    @property
    def live(self) -> bool:
        """False: it was silent for `watchdog_s` with requests waiting, and no new one is ready yet."""
        return self._supervisor.live

    @property
    def num_restarts(self) -> int:
        return self._supervisor.num_restarts

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None if it is a thread, or there is none now."""
        return self._supervisor.pid

    @property
    def num_in_flight(self) -> int:
        return len(self._streams)

    @property
    def on_device(self) -> frozenset[str]:
        """Keys of the adapters on the device, as far as its events have told."""
        return frozenset(self._on_device)

    def stats(self) -> EngineStats:
        """What the engine last told; at most 0.1 s old while it works."""
        return self._stats

    def submit(self, request: EngineRequest) -> DeltaStream:
        """Send one request; its id must be unused. Leaving the iterator aborts it.

        Raises:
            EngineUnavailable: there is no engine now; try again later.
        """
        if self._draining:
            raise EngineUnavailable("the engine is finishing its last requests before it stops.")
        assert request.request_id not in self._streams, "request ids are unique"
        self._supervisor.send({"kind": wire.SUBMIT, "request": wire.request_to_json(request)})
        stream = DeltaStream(request.request_id, time.monotonic(), self._leave)
        self._streams[request.request_id] = weakref.ref(stream)
        self._empty.clear()
        self._supervisor.expect_answer(True)
        return stream

    async def abort(self, request_id: str) -> bool:
        """End a request; its iterator gets a last delta with finish ABORTED. False: no such request runs."""
        found = self._streams.get(request_id)
        if found is None:
            return False
        stream = found()
        self._leave(request_id)
        if stream is not None:
            stream.push(RequestDelta(request_id, finish=FinishReason.ABORTED))
        return True

    def expect(self, ticket: AdapterTicket) -> None:
        """Say that a request for this adapter will follow: its load begins now. Nothing is told of how it ends."""
        if ticket.key in self._on_device:
            return
        with contextlib.suppress(EngineUnavailable):  # the request itself will be told
            self._supervisor.send({"kind": wire.EXPECT, "ticket": wire.ticket_to_json(ticket)})

    async def load(self, ticket: AdapterTicket, tier: Tier = Tier.DEVICE) -> AdapterState:
        """Bring an adapter to the device, or to the host tier, and wait until it is there.

        Raises:
            AdapterLoadFailed, AdapterTooLarge, NoRoomForAdapter, EngineUnavailable
        """
        waiter: asyncio.Future[AdapterEvent] = self._loop.create_future()
        self._loads.setdefault((ticket.key, tier), []).append(waiter)
        try:
            order = {"kind": wire.LOAD, "ticket": wire.ticket_to_json(ticket), "tier": tier.value}
            state = AdapterState(await self._call(order))
            if state is not AdapterState.LOADING:
                return state
            event = await waiter
        finally:
            self._forget_load((ticket.key, tier), waiter)
        if event.state == AdapterState.FAILED:
            raise AdapterLoadFailed(f'adapter "{ticket.name}" could not be loaded: {event.reason}')
        return AdapterState(event.state)

    async def evict(self, key: str, tier: Tier = Tier.DEVICE) -> bool:
        """Take an adapter off the device, or out of the host tier; False if it is not there.

        Raises:
            AdapterBusy: requests run on it, it is being loaded, or it is kept.
            EngineUnavailable
        """
        return bool(await self._call({"kind": wire.EVICT, "key": key, "tier": tier.value}))

    async def keep(self, tickets: Sequence[AdapterTicket]) -> None:
        """From now on exactly these adapters stay on the device, over restarts of the engine, too.

        They are loaded as soon as there is room, and evicted only when otherwise nothing at all could run.

        Raises NoRoomForAdapter (together they are too large; nothing is changed), EngineUnavailable.
        """
        await self._call(_keep_order(tickets))
        self._kept = tuple(tickets)

    async def residency(self, *, with_past: bool = False) -> list[ResidentAdapter]:
        """Adapters that are on the device, on their way, in the host tier or failed; with the past, those that were.

        Raises EngineUnavailable.
        """
        return wire.residents_from_json(await self._call({"kind": wire.RESIDENCY, "past": with_past}))

    async def drain(self, timeout_s: float) -> int:
        """Accept nothing more and wait until the accepted requests have ended; how many had not in time."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        return len(self._streams)

    async def close(self) -> None:
        """End the engine; requests still running end FAILED. May be called twice."""
        await self._supervisor.close()

    # --- what the supervisor tells

    def on_progress(self, stage: str, fraction: float) -> None:
        self._on_event(LoadProgress(stage, fraction))

    def on_state(self, state: EngineState, message: str) -> None:
        self._on_device.clear()
        if state is EngineState.READY and self._kept:
            self._supervisor.send({**_keep_order(self._kept), "call": next(self._call_numbers)})
        self._on_event(StateChange(state, message))

    def on_lost(self, reason: str) -> None:
        record = EngineErrorRecord(EngineUnavailable.__name__, reason, retryable=True)
        now_s = time.monotonic()
        for request_id in list(self._streams):
            self._deliver(RequestDelta(request_id, finish=FinishReason.FAILED, error=record), now_s)
        for future in (*self._calls.values(), *itertools.chain.from_iterable(self._loads.values())):
            if not future.done():
                future.set_exception(EngineUnavailable(reason))
                future.exception()  # read, so that one nobody waits for any more is no warning
        self._calls.clear()
        self._loads.clear()

    def on_message(self, message: Message) -> None:
        kind = message["kind"]
        if kind == wire.STEP:
            self._on_step(message)
        elif kind == wire.STATS:
            self._stats = wire.stats_from_json(message["stats"])
            self.metrics.step_adapters.observe(self._stats.last_step_adapters)
        elif kind == wire.REPLY:
            self._on_reply(message)

    def _on_step(self, message: Message) -> None:
        now_s = self._supervisor.heard_s
        streams, observe_gap = self._streams, self.metrics.token_gap_s.observe
        logprobs = message.get("logprobs") or itertools.repeat(None, len(message["ids"]))
        for request_id, token_id, record in zip(message["ids"], message["tokens"], logprobs, strict=True):
            found = streams.get(request_id)
            stream = None if found is None else found()
            if stream is None:
                continue  # left already; the engine has been told
            observe_gap(now_s - stream.last_token_s)
            stream.last_token_s = now_s
            stream.num_tokens += 1
            stream.push_token(token_id, None if record is None else wire.logprobs_from_json(record))
        for data in message.get("special", ()):
            self._deliver(wire.delta_from_json(data), now_s)
        if message["computed"]:
            self.metrics.step_tokens.observe(message["computed"])
        for event in message.get("events", ()):
            self._on_adapter_event(AdapterEvent(*event))

    def _deliver(self, delta: RequestDelta, now_s: float) -> None:
        found = self._streams.get(delta.request_id)
        if found is None:
            return
        if delta.finish is not None:
            self._remove(delta.request_id)
        stream = found()
        if stream is None:
            return
        if delta.token_ids:
            self._observe_tokens(stream, len(delta.token_ids), now_s)
        stream.push(delta)

    def _observe_tokens(self, stream: DeltaStream, num_tokens: int, now_s: float) -> None:
        if stream.first_token_s is None:
            stream.first_token_s = now_s
            self.metrics.first_token_s.observe(now_s - stream.submitted_s)
        else:
            self.metrics.token_gap_s.observe((now_s - stream.last_token_s) / num_tokens, num_tokens)
        stream.last_token_s = now_s
        stream.num_tokens += num_tokens

    def _on_adapter_event(self, event: AdapterEvent) -> None:
        self.metrics.adapter_events[event.state] += 1
        if event.state == AdapterState.DEVICE:
            self._on_device.add(event.key)
        elif event.reason:  # evicted, and not only warmed beside its copy on the device
            self._on_device.discard(event.key)
        for tier in _ENDS.get(event.state, ()) if event.state == AdapterState.FAILED or not event.reason else ():
            for waiter in self._loads.get((event.key, tier), ()):
                if not waiter.done():
                    waiter.set_result(event)
        self._on_event(event)

    def _on_reply(self, message: Message) -> None:
        future = self._calls.pop(message["call"], None)
        if future is None or future.done():
            return
        if "error" in message:
            future.set_exception(wire.error_from_record(EngineErrorRecord(*message["error"])))
        else:
            future.set_result(message["result"])

    # --- sending

    async def _call(self, message: Message) -> Any:
        number = next(self._call_numbers)
        future = self._calls[number] = self._loop.create_future()
        try:
            self._supervisor.send({**message, "call": number})
            return await future
        finally:
            self._calls.pop(number, None)

    def _leave(self, request_id: str) -> None:
        """The consumer is gone: the engine frees the request's blocks at its next step."""
        if request_id not in self._streams:
            return
        self._remove(request_id)
        with contextlib.suppress(EngineUnavailable):
            self._supervisor.send({"kind": wire.ABORT, "request_id": request_id})

    def _remove(self, request_id: str) -> None:
        del self._streams[request_id]
        if not self._streams:
            self._empty.set()
            self._supervisor.expect_answer(False)

    def _forget_load(self, key: tuple[str, Tier], waiter: asyncio.Future[AdapterEvent]) -> None:
        waiters = self._loads.get(key, [])
        if waiter in waiters:
            waiters.remove(waiter)
        if not waiters:
            self._loads.pop(key, None)


def _keep_order(tickets: Sequence[AdapterTicket]) -> Message:
    return {"kind": wire.KEEP, "tickets": [wire.ticket_to_json(ticket) for ticket in tickets]}
