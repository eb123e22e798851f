"""A demo server in a process of its own, for the tour, the judge and the tests.

    with Household(store) as house:
        Visitor(house.url).generate("How do I ...")

Entering starts `veneer serve` on a free port and waits until it is healthy; leaving asks
it to end and waits until it has. What it prints is kept in a file, for the day it fails.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from server.demo.visitor import Visitor

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
_POLL_S = 0.1
_NUM_THREADS = "1"  # the base is so small that a second thread would only wait for the first
_LAST_LINES = 15


class ServerFailed(Exception):
    """The server did not start, or ended by itself; the message ends with its last lines."""


class Household:
    """One running server; `store` is the directory where it keeps what is uploaded, and its log."""

    def __init__(self, store: Path, arguments: Sequence[str] = ()) -> None:
        self._log = store / "server.log"
        self._arguments = ["--store-dir", str(store / "store"), "--num-threads", _NUM_THREADS, *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def exit_code(self) -> int | None:
        """How the server ended; None while it runs."""
        return None if self._process is None else self._process.poll()

    def __enter__(self) -> Household:
        command = [sys.executable, "-m", "server", "serve", "--host", "127.0.0.1", "--port", str(self.port)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VENEER_")}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # an interrupt at the terminal reaches the tour, which then ends the server
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """Ask the server to finish what it has and end; returns its exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def last_words(self) -> str:
        """The end of what the server printed."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:])

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        visitor = Visitor(self.url, timeout_s=5.0)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not visitor.is_ready():
            if self._process.poll() is not None:
                raise ServerFailed(f"the server ended with code {self._process.returncode}:\n{self.last_words()}")
            if time.monotonic() > deadline_s:
                raise ServerFailed(f"the server is not ready after {START_TIMEOUT_S:.0f} s:\n{self.last_words()}")
            time.sleep(_POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
