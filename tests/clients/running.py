"""A server in a process of its own, started as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

_READY = re.compile(r"Veneer serves .* on (http://[^ ]+) ")
_START_TIMEOUT_S = 120.0


class RunningServer:
    """`veneer serve` on a free port; what it prints is in `output`."""

    def __init__(self, directory: Path, arguments: Sequence[str], **environment: str) -> None:
        self._log = directory / "server.log"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("VENEER_")}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server", "serve", *arguments, "--port", "0", "--num-threads", "1"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**kept, "PYTHONUNBUFFERED": "1", **environment},
            )
        self.url = ""

    @property
    def output(self) -> str:
        return self._log.read_text()

    def __enter__(self) -> RunningServer:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            ready = _READY.search(self.output)
            if ready:
                self.url = ready[1]
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.process.kill()
        raise RuntimeError(f"the server did not start:\n{self.output[-3000:]}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def cache(self) -> dict[str, Any]:
        return dict(httpx.get(self.url + "/admin/v1/cache", timeout=60).json())

    def wait_until_idle(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """The admin's view once nothing runs, waits, or is held; the last view if that never comes."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            view = self.cache()
            busy = view["requests_running"] + view["requests_waiting"] + view["leases"] + view["units"]["kv"]
            pins = sum(one["pins"] for one in view["residents"])
            if busy + pins == 0 or time.monotonic() > deadline_s:
                return view
            time.sleep(0.02)


def is_idle(view: dict[str, Any]) -> bool:
    """Whether nothing is held: no request, no lease, no block, no pin."""
    numbers = [view["requests_running"], view["requests_waiting"], view["leases"], view["units"]["kv"]]
    return not any(numbers) and not any(one["pins"] for one in view["residents"])
