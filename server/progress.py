"""What a person sees while the server starts: one line a stage with its time, then how to use it.

loading the base          0.84 s
self-check                0.12 s
adapters                  0.31 s
Veneer serves veneer-demo-base with 14 adapters on http://127.0.0.1:8000 (ready in 1.4 s)
"""

from __future__ import annotations

import json
import shlex
import time
from typing import TextIO

from server.demo import EXAMPLE_PROMPT
from server.engine.client import EngineEvent, LoadProgress
from server.settings import Settings

_EXAMPLE_TOKENS = 100


class Progress:
    """Prints a stage when the next one begins. On a terminal the running stage shows its percentage."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._started_s = time.perf_counter()
        self._stage: str | None = None
        self._stage_started_s = self._started_s

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self._started_s

    def on_event(self, event: EngineEvent) -> None:
        if isinstance(event, LoadProgress):
            self.stage(event.stage, event.fraction)

    def stage(self, name: str, fraction: float = 0.0) -> None:
        if name != self._stage:
            self.finish()
            self._stage, self._stage_started_s = name, time.perf_counter()
        if self._is_terminal:
            print(f"\r  {name:28}{fraction:5.0%}", end="", file=self._out, flush=True)
        if fraction >= 1.0:
            self.finish()

    def finish(self) -> None:
        """End the running stage, if there is one."""
        if self._stage is None:
            return
        seconds = time.perf_counter() - self._stage_started_s
        start = "\r" if self._is_terminal else ""
        print(f"{start}  {self._stage:28}{seconds:6.2f} s", file=self._out, flush=True)
        self._stage = None


def ready_lines(settings: Settings, adapters: list[str], num_adapters: int, port: int, total_s: float) -> list[str]:
    """The last words of a start: what is served where, and three commands that work when pasted.

    `adapters` are names to show, one or two are enough; `num_adapters` is how many there are.
    """
    host = "127.0.0.1" if settings.bind_host in ("0.0.0.0", "::", "") else settings.bind_host
    shown_host = f"[{host}]" if ":" in host else host
    scheme = "https" if settings.ssl_certfile else "http"
    url = f"{scheme}://{shown_host}:{port}"
    count = f"{num_adapters} adapter{'' if num_adapters == 1 else 's'}"
    lines = [f"Veneer serves {settings.base_name} with {count} on {url} (ready in {total_s:.1f} s)", ""]
    named = [("the base", "/generate", None), ("a stream", "/generate_stream", adapters[-1] if adapters else None)]
    if adapters:
        named.insert(1, (f"the adapter {adapters[0]}", "/generate", adapters[0]))
    prompt = EXAMPLE_PROMPT if settings.model is None else "Once upon a time"
    for label, path, adapter in named:
        lines += [f"# {label}", _curl(url + path, prompt, adapter, settings), ""]
    return lines


def _curl(url: str, prompt: str, adapter: str | None, settings: Settings) -> str:
    body: dict[str, object] = {"inputs": prompt}
    if adapter is not None:
        body["adapter"] = adapter
    body["parameters"] = {"max_new_tokens": _EXAMPLE_TOKENS}
    words = ["curl", "-sN" if url.endswith("_stream") else "-s", url, "-H", "'Content-Type: application/json'"]
    if settings.api_key or settings.keys_file:
        words += ["-H", '"Authorization: Bearer $VENEER_API_KEY"']
    return " ".join([*words, "-d", shlex.quote(json.dumps(body))])
