"""The engine's process: one thread that takes messages, steps, and tells what each step gave.

    python -m server.engine.worker --fd 5

First it reads the configuration and builds the engine, telling its progress; then it loops:

    drain the inbox -> step -> one message        work to do
    sleep until a message comes                   none

Without work it sleeps in the kernel, for as long as it takes. When there is work that cannot run yet
(an adapter is being read), it looks again after a pause that doubles from 0.5 to 16 ms.
It knows no model: `server.engine.assembly` builds one (tests name another builder with `--build`).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from server.channel import ChannelClosed, Message, WorkerChannel
from server.engine import wire
from server.engine.config import EngineConfig
from server.engine.description import EngineDescription
from server.engine.errors import EngineError
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
from server.engine.step import StepOutput
from server.engine.watchdog import Watchdog

DEFAULT_BUILD = "server.engine.assembly:build_engine"

_STATS_EVERY_S = 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.016

_log = logging.getLogger(__name__)


class SteppedEngine(Protocol):
    """The part of `server.engine.engine.Engine` that the loop drives."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: EngineRequest) -> None: ...
    def abort(self, request_id: str) -> bool: ...
    def step(self) -> StepOutput: ...
    def stats(self) -> EngineStats: ...
    def expect(self, ticket: AdapterTicket) -> None: ...
    def load(self, ticket: AdapterTicket, tier: Tier = Tier.DEVICE) -> AdapterState: ...
    def evict(self, key: str, tier: Tier = Tier.DEVICE) -> bool: ...
    def keep(self, tickets: list[AdapterTicket]) -> None: ...
    def residents(self, *, with_past: bool = False) -> list[ResidentAdapter]: ...


Progress = Callable[[str, float], None]  # stage, and how much of it is done: 0..1
Build = Callable[[EngineConfig, Progress], tuple[SteppedEngine, EngineDescription]]


class EngineLoop:
    """Drives one engine from one channel until the other end hangs up or says stop."""

    def __init__(self, engine: SteppedEngine, channel: WorkerChannel, watchdog: Watchdog) -> None:
        self._engine = engine
        self._channel = channel
        self._watchdog = watchdog
        self._stats_told_s = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._refused: list[RequestDelta] = []

    def run(self) -> None:
        try:
            while self._turn():
                pass
        except ChannelClosed:
            return
        finally:
            self._watchdog.rest()

    def _turn(self) -> bool:
        """One round of the loop; False when it was told to stop."""
        for message in self._channel.receive():
            if message["kind"] == wire.STOP:
                return False
            self._take(message)
        if not self._engine.has_work and not self._refused:
            self._tell_stats()
            self._watchdog.rest()
            self._channel.wait()
            return True
        self._watchdog.beat()
        self._step()
        return True

    def _step(self) -> None:
        output = self._engine.step()
        if self._refused:
            output.special.extend(self._refused)
            self._refused = []
        if output.num_tokens or output.request_ids or output.special or output.adapter_events:
            self._channel.send(wire.step_to_json(output))
        if time.monotonic() - self._stats_told_s >= _STATS_EVERY_S:
            self._tell_stats()
        if output.num_tokens:
            self._pause_s = _FIRST_PAUSE_S
        elif self._engine.has_work:
            self._channel.wait(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _tell_stats(self) -> None:
        self._channel.send({"kind": wire.STATS, "stats": wire.stats_to_json(self._engine.stats())})
        self._stats_told_s = time.monotonic()

    def _take(self, message: Message) -> None:
        kind = message["kind"]
        if kind == wire.SUBMIT:
            self._submit(wire.request_from_json(message["request"]))
        elif kind == wire.EXPECT:
            self._engine.expect(wire.ticket_from_json(message["ticket"]))
        elif kind == wire.ABORT:
            self._engine.abort(message["request_id"])
        else:
            self._reply(message)

    def _submit(self, request: EngineRequest) -> None:
        try:
            self._engine.submit(request)
        except EngineError as error:
            record = EngineErrorRecord(error.kind, str(error), error.retryable)
            self._refused.append(RequestDelta(request.request_id, finish=FinishReason.FAILED, error=record))

    def _reply(self, message: Message) -> None:
        reply: Message = {"kind": wire.REPLY, "call": message["call"]}
        try:
            reply["result"] = self._call(message)
        except EngineError as error:
            reply["error"] = [error.kind, str(error), error.retryable]
        self._channel.send(reply)

    def _call(self, message: Message) -> Any:
        kind = message["kind"]
        if kind == wire.LOAD:
            return self._engine.load(wire.ticket_from_json(message["ticket"]), Tier(message["tier"])).value
        if kind == wire.EVICT:
            return self._engine.evict(message["key"], Tier(message["tier"]))
        if kind == wire.KEEP:
            self._engine.keep([wire.ticket_from_json(ticket) for ticket in message["tickets"]])
            return None
        assert kind == wire.RESIDENCY, f"a message of kind {kind!r} is not ours"
        return wire.residents_to_json(self._engine.residents(with_past=message["past"]))


def serve(channel: WorkerChannel, build: Build) -> int:
    """Build the engine that the first message describes, then run it; the exit status of the process."""
    messages: list[Message] = []
    try:
        while not messages:
            channel.wait()
            messages = channel.receive()
    except ChannelClosed:
        return 0
    config = EngineConfig.from_json(messages[0]["config"])

    def tell(stage: str, fraction: float) -> None:
        channel.send({"kind": wire.PROGRESS, "stage": stage, "fraction": fraction})

    try:
        engine, description = build(config, tell)
    except ChannelClosed:
        return 0
    except Exception as error:
        if not isinstance(error, EngineError):
            _log.exception("the engine could not start")
        message = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        channel.send({"kind": wire.FAILED, "message": message})
        return 1
    channel.send({"kind": wire.READY, "description": wire.description_to_json(description)})
    EngineLoop(engine, channel, Watchdog(config.watchdog_s)).run()
    return 0


def build_named(name: str) -> Build:
    """The builder MODULE:FUNCTION; imported when it is called, so that what fails then is told to the front."""

    def build(config: EngineConfig, progress: Progress) -> tuple[SteppedEngine, EngineDescription]:
        module, _, function = name.partition(":")
        progress("import", 0.0)
        found: Build = getattr(importlib.import_module(module), function)
        return found(config, progress)

    return build


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m server.engine.worker", description="Started by the front.")
    parser.add_argument("--fd", type=int, required=True, help="descriptor of the channel to the front")
    parser.add_argument("--build", default=DEFAULT_BUILD, help="MODULE:FUNCTION that builds the engine")
    options = parser.parse_args(arguments)
    channel = WorkerChannel.open(options.fd)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s engine %(name)s: %(message)s")
    return serve(channel, build_named(options.build))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
