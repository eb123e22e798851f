"""The front's door to the loader process: one job at a time, a dead loader is started again.

    loader = await LoaderClient.launch()          # the process begins to import what it needs
    await loader.aim(target)                      # the base is known
    prepared = await loader.prepare(PrepareJob(files, image_path))

A job whose loader dies fails with LoaderUnavailable (retryable) and the next job starts a new one. A job that takes
longer than `job_timeout_s` ends with its loader. (The loader itself bounds how long checking a config may take.)
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from typing import Any

from server.channel import ChannelClosed, Message, Worker, spawn
from server.loader.errors import AdapterRefused, LoaderUnavailable
from server.loader.job import PackingTarget, Prepared, PrepareJob

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
JOB_TIMEOUT_S = 1800.0  # kinds that decompose the base's weights need minutes on a large base
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class LoaderClient:
    """A `Loader` in a process of its own."""

    def __init__(self, job_timeout_s: float = JOB_TIMEOUT_S) -> None:
        self.num_starts = 0
        self._target: PackingTarget | None = None
        self._job_timeout_s = job_timeout_s
        self._variant = ""
        self._line: _Line | None = None
        self._turn = asyncio.Lock()
        self._is_closed = False

    @classmethod
    async def launch(cls, job_timeout_s: float = JOB_TIMEOUT_S) -> LoaderClient:
        """Starts the process and does not wait for it; it takes jobs after `aim`."""
        client = cls(job_timeout_s)
        client._line = await _Line.open()
        client.num_starts = 1
        return client

    async def aim(self, target: PackingTarget) -> None:
        """Say once what adapters are packed for. Raises LoaderUnavailable if the process has not come up."""
        assert self._target is None, "a loader packs for one base"
        self._target = target
        async with self._turn:
            await self._open_line()

    @property
    def target(self) -> PackingTarget:
        assert self._target is not None, "the loader is aimed before it is used"
        return self._target

    @property
    def variant(self) -> str:
        assert self._variant, "the loader is aimed before it is used"
        return self._variant

    @property
    def process_id(self) -> int | None:
        """Of the loader process; None while there is none."""
        return None if self._line is None else self._line.worker.process.pid

    async def prepare(self, job: PrepareJob) -> Prepared:
        """Runs one job when those before it are done. Cancelled, it stops the loader, as nobody wants the result.

        Raises:
            AdapterRefused: what is wrong with the adapter, or that checking it took too long.
            LoaderUnavailable: the loader died meanwhile, or is closed; the job may be tried again.
        """
        async with self._turn:
            line = await self._open_line()
            try:
                message = await line.ask({"op": "prepare", "job": asdict(job)}, self._job_timeout_s)
            except TimeoutError as error:
                raise AdapterRefused(
                    f"preparing the adapter took longer than {self._job_timeout_s:.0f} s and was given up. Kinds that "
                    "decompose the base's weights (OSF, PSOFT, KaSA, PiSSA) can be turned into plain LoRA on a faster "
                    "machine: `veneer adapters convert --base`.",
                    code="check_timed_out",
                ) from error
            finally:
                await self._drop_line_unless_idle(line)
        if message["op"] == "refused":
            raise AdapterRefused.from_details(message["error"])
        return Prepared(**message["prepared"])

    async def close(self) -> None:
        """Ends the process; jobs in progress and later ones fail. Again is harmless."""
        self._is_closed = True
        line, self._line = self._line, None
        if line is not None:
            await line.worker.close(timeout_s=1.0)

    async def _open_line(self) -> _Line:
        if self._is_closed:
            raise LoaderUnavailable("the loader is stopped; the server is shutting down.")
        line = self._line
        if line is None or not line.worker.channel.is_open:
            line = self._line = await _Line.open()
            self.num_starts += 1
            if self.num_starts > 1:
                logger.warning("the loader process was started again")
        if line.is_configured:
            return line
        try:
            reply = await line.ask({"op": "configure", "target": asdict(self.target)}, START_TIMEOUT_S)
        except TimeoutError as error:
            raise LoaderUnavailable(f"the loader process did not start within {START_TIMEOUT_S:.0f} s.") from error
        finally:
            await self._drop_line_unless_idle(line)
        self._variant = str(reply["variant"])
        line.is_configured = True
        return line

    async def _drop_line_unless_idle(self, line: _Line) -> None:
        """Ends a loader that died, or still works on what nobody waits for."""
        if line.is_idle:
            return
        if self._line is line:
            self._line = None
        await line.worker.close(timeout_s=1.0)


class _Line:
    """One loader process and the one answer that is expected of it."""

    worker: Worker

    def __init__(self) -> None:
        self.is_configured = False
        self._answer: asyncio.Future[Message] | None = None
        self._is_open = True

    @classmethod
    async def open(cls) -> _Line:
        line = cls()
        line.worker = await spawn(
            "server.loader.worker", on_message=line._on_message, on_close=line._on_close, environment=_ENVIRONMENT
        )
        return line

    @property
    def is_idle(self) -> bool:
        """Whether the process lives and owes no answer."""
        return self._is_open and self._answer is None

    async def ask(self, message: dict[str, Any], timeout_s: float) -> Message:
        """Raises LoaderUnavailable, TimeoutError; the line is not idle afterwards."""
        assert self._answer is None, "one question at a time"
        try:
            self.worker.channel.send(message)
        except ChannelClosed as error:
            self._is_open = False
            raise LoaderUnavailable("the loader process has died; try again.") from error
        self._answer = asyncio.get_running_loop().create_future()
        reply = await asyncio.wait_for(self._answer, timeout_s)
        self._answer = None
        return reply

    def _on_message(self, message: Message) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    def _on_close(self) -> None:
        self._is_open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(LoaderUnavailable("the loader process died while it worked on this; try again."))
