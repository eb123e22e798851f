"""A Veneer server as a child process: started with flags, ready when it says so, ended with SIGTERM."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_READY = re.compile(r"(https?://\S+?:\d+)")
_ROOT = Path(__file__).parent.parent


class ServerProcess:
    """`with ServerProcess(model, flags) as server: server.url`."""

    def __init__(self, model: Path, flags: Sequence[str] = (), store: Path | None = None) -> None:
        """`store`: its adapters' store, left as it is at the end; without it, a temporary directory."""
        self._folder = Path(tempfile.mkdtemp(prefix="veneer-bench-"))
        self._command = [sys.executable, "-m", "server", "serve", str(model), "--port", "0"]
        self._command += ["--store-dir", str(store or self._folder / "store"), *flags]
        self.log = self._folder / "stderr"
        self.url = ""

    def __enter__(self) -> ServerProcess:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=_ROOT)
        assert self._process.stdout is not None, "stdout was asked for"
        for line in self._process.stdout:
            found = _READY.search(line)
            if found:
                self.url = found[1]
                return self
        self._process.wait()
        raise RuntimeError(f"the server ended before it was ready:\n{self.log.read_text()[-2000:]}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None, "stdout was asked for"
        self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)
