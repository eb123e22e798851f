"""Work that outlives its request: what it does now, how far it is, and how it ended.

    operation = service.operations.start("adapter.register", "sql", work, actor="key 1")     work(operation) runs on
    operation.enter("downloading"); operation.advance(241970, 83886080)                      inside of it
    operation.note(version=3)                                    what has been done that lasts, should it fail after
    operation.seal()                                                                         too late to cancel
    async for seen in operation.changes(): ...                                               ends with the operation

    queued -> downloading | validating | loading -> succeeded | failed | cancelled

Operations live as long as the process; of those that ended the last `MAX_KEPT` are kept. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from server.api.errors import BUG, AdminRefusal, Explanation, explain

MAX_KEPT = 1000
log = logging.getLogger("veneer.http")
Step = Literal["queued", "downloading", "validating", "loading"]
Status = Literal[Step, "succeeded", "failed", "cancelled"]


class Operation:
    """One piece of work. Its own work moves it on; everybody else reads."""

    def __init__(self, kind: str, target: str, actor: str) -> None:
        self.id = f"op_{int(time.time() * 1000):011x}{secrets.token_hex(7)}"
        self.kind = kind  # "adapter.register", "adapter.load"
        self.target = target  # "sql" or "sql@3"
        self.actor = actor  # who asked for it
        self.status: Status = "queued"
        self.completed = 0  # bytes
        self.total: int | None = None  # None: not known
        self.result: Mapping[str, Any] | None = None  # the resource that it made
        self.error: Explanation | None = None
        self.changed: dict[str, Any] = {}  # for the audit log: what it has done that lasts
        self.created_at = self.updated_at = _now()
        self.is_sealed = False
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_done(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")

    def enter(self, step: Step) -> None:
        """The work goes on with its next step; progress starts over."""
        self.completed, self.total = 0, None
        self._turn(step)

    def advance(self, completed: int, total: int | None = None) -> None:
        """How far the step is, in bytes. Cheap enough to be called for every piece of a download."""
        self.completed, self.total = completed, total
        self._tell()

    def note(self, **facts: Any) -> None:
        """Says what has been changed, for the audit log."""
        self.changed.update(facts)

    def seal(self) -> None:
        """From here on it runs to its end: whoever cancels it is told that it is too late."""
        self.is_sealed = True

    async def wait(self, timeout_s: float) -> bool:
        """Returns when it has ended, or after the time; whether it has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                async for _ in self.changes():
                    pass
        return self.is_done

    async def changes(self) -> AsyncGenerator[Operation, None]:
        """The operation now and after every change; several changes between two looks are one. Ends when it ends."""
        while True:
            changed = self._changed
            yield self
            if self.is_done:
                return
            await changed.wait()

    def _turn(self, status: Status) -> None:
        self.status = status
        self._tell()

    def _tell(self) -> None:
        self.updated_at = _now()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def run(self, work: Work) -> None:
        """Starts it; called once, by the book."""
        self._task = asyncio.get_running_loop().create_task(self._run(work))

    async def _run(self, work: Work) -> None:
        try:
            self.result = await work(self)
        except asyncio.CancelledError:
            self._turn("cancelled")
            raise
        except Exception as error:
            self.error = explain(error)
            if self.error is None:
                log.error("%s of %s failed, id=%s", self.kind, self.target, self.id, exc_info=error)
                self.error = BUG
            self._turn("failed")
        else:
            self._turn("succeeded")

    async def cancel(self) -> None:
        """Ends it and waits until it has. Raises AdminRefusal when it has ended or is about to commit."""
        if self.is_done:
            raise AdminRefusal(409, "operation_done", f"operation {self.id} has {self.status}")
        if self.is_sealed or self._task is None:
            raise AdminRefusal(
                409, "operation_sealed", f"operation {self.id} is about to end; it is too late to cancel"
            )
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if not self.is_done:  # it was cancelled before its first step
            self._turn("cancelled")


Work = Callable[[Operation], Awaitable[Mapping[str, Any] | None]]
OnChange = Callable[[Operation, Exception | None], Awaitable[None]]


class OperationBook:
    """All operations of one server, oldest first."""

    def __init__(self, on_change: OnChange | None = None) -> None:
        """`on_change` hears of every operation that succeeded, or failed after it had noted a change.

        It hears before those who wait for the operation do.
        """
        self._operations: OrderedDict[str, Operation] = OrderedDict()
        self._on_change = on_change

    def start(self, kind: str, target: str, work: Work, *, actor: str, is_change: bool = True) -> Operation:
        """Runs `work` in the background; what it returns is the operation's result, what it raises its error.

        Of work that only looks (`is_change` False), `on_change` hears nothing.
        """
        operation = Operation(kind, target, actor)
        self._operations[operation.id] = operation
        self._forget_old()

        async def told(running: Operation) -> Mapping[str, Any] | None:
            try:
                result = await work(running)
            except Exception as error:
                if running.changed and self._on_change is not None:
                    await self._on_change(running, error)
                raise
            if "version" in (result or {}):
                running.note(version=(result or {})["version"])
            if is_change and self._on_change is not None:
                await self._on_change(running, None)
            return result

        operation.run(told)
        return operation

    def find(self, operation_id: str, sees: Callable[[Operation], bool]) -> Operation:
        """Raises AdminRefusal for one that is not there, or that the caller does not see."""
        found = self._operations.get(operation_id)
        if found is None or not sees(found):
            text = f"there is no operation {operation_id[:80]!r}; it may have ended long ago."
            raise AdminRefusal(404, "operation_not_found", text)
        return found

    def knows(self, operation_id: str) -> bool:
        """Whether it is still told of."""
        return operation_id in self._operations

    def all(self) -> list[Operation]:
        """Youngest first."""
        return list(reversed(self._operations.values()))

    def _forget_old(self) -> None:
        done = [key for key, operation in self._operations.items() if operation.is_done]
        for key in done[: max(0, len(self._operations) - MAX_KEPT)]:
            del self._operations[key]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
