"""The state of one HTTP server: the only mutable thing that all routes share.

    starting --attach()--> ready --drain()--> draining --close()
        \\--fail()--> failed

The port is open from the first second, so that probes can tell a server that loads from one that is dead; until
`attach` every request is answered 503. `in_house` counts requests from the moment they pass the door until their last
byte, and a drain waits for it to fall to zero.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from adapters_store.answers import AnswerBook
from server.api.audit import Audit
from server.api.auth import Gate
from server.api.caretaker import Caretaker
from server.api.errors import NotReady, TooManyRequests
from server.api.metrics import DoorMetrics
from server.api.operation import OperationBook
from server.api.upload_places import UploadPlaces
from server.front.front import Front
from server.front.golden import golden_answers
from server.library.shared_work import SharedWork
from server.settings import Settings
from server.usage import UsageLedger

log = logging.getLogger("veneer.http")
State = Literal["starting", "ready", "draining", "failed"]


class Service:
    """One server's settings, gate, metrics and, once it is up, its front."""

    def __init__(self, settings: Settings, front: Front | None = None) -> None:
        self.settings = settings
        self.gate = Gate(settings)
        self.metrics = DoorMetrics()
        self.audit = Audit()
        self.operations = OperationBook(self.audit.note_operation)
        self.joined = SharedWork()  # loads that several clients asked for at once
        self.in_house = 0
        self.started_at = time.time()
        self.ledger: UsageLedger | None = None
        self._answers: AnswerBook | None = None
        self.uploads = UploadPlaces(settings.max_concurrent_uploads)
        self._state: State = "starting"
        self._reason = "the base model is being loaded"
        self._front: Front | None = None
        self._empty = asyncio.Event()
        self._empty.set()
        self._tasks: set[asyncio.Task[None]] = set()
        if front is not None:
            self.attach(front)

    @property
    def state(self) -> State:
        return self._state

    @property
    def is_healthy(self) -> bool:
        """Whether a request sent now would be taken and find an engine."""
        return self._state == "ready" and self._front is not None and self._front.engine.state == "ready"

    @property
    def unhealthy_reason(self) -> str:
        if self._state == "ready" and self._front is not None:
            return f"the engine is {self._front.engine.state}"
        return self._reason

    @property
    def front(self) -> Front:
        """Raises NotReady unless requests are taken now."""
        if self._front is None or self._state != "ready":
            raise NotReady(self._reason, "draining" if self._state == "draining" else "loading")
        return self._front

    @property
    def front_or_none(self) -> Front | None:
        """The front in any state, for those who only look."""
        return self._front

    @property
    def answers(self) -> AnswerBook:
        """What was answered to requests with a key. Raises NotReady unless requests are taken now."""
        if self._answers is None or self._state != "ready":
            raise NotReady(self._reason, "draining" if self._state == "draining" else "loading")
        return self._answers

    def attach(self, front: Front) -> None:
        self._front = front
        self._state = "ready"
        self.audit.open(front.library.catalog.root)
        self._answers = AnswerBook(front.library.catalog.root)
        releases = front.library.releases
        releases.answer = releases.answer or golden_answers(front)
        releases.on_rolled_back = self.audit.note_canary
        front.library.pins.keep = front.engine.keep
        self.keep(front.library.pins.sync())
        settings = self.settings
        self.keep(Caretaker(front, self.audit, settings.adapters_dir, settings.watch_adapters_dir_s).run())

    def fail(self, reason: str) -> None:
        self._state, self._reason = "failed", reason

    @contextmanager
    def guest(self) -> Iterator[None]:
        """Count one request in and out. Raises TooManyRequests at the cap of concurrent requests."""
        cap = self.settings.max_concurrent_requests
        if cap is not None and self.in_house >= cap:
            raise TooManyRequests(f"{self.in_house} requests are in the house and it takes {cap}; try again in 1 s.", 1)
        self.in_house += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.in_house -= 1
            if self.in_house == 0:
                self._empty.set()

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that outlives its request; it ends with the event loop at the latest."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("work in the background failed: %s", error)

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new and wait for those in the house. True when all left in time."""
        self._state, self._reason = "draining", "the server is shutting down; send the request to another replica"
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
