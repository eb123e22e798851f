"""How far an offline run is: a live line on a terminal, stages as lines elsewhere, nothing when quiet."""

from __future__ import annotations

from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from server.engine.client import EngineEvent, LoadProgress, StateChange
from server.engine.supervisor import EngineState


class OfflineProgress:
    """Writes to `out` only; a context manager, because a live line must be taken down."""

    def __init__(self, out: TextIO, *, is_quiet: bool = False) -> None:
        self._console = Console(file=out, quiet=is_quiet, highlight=False)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task: TaskID = self._bar.add_task("starting", total=None)
        self._stage = ""

    def on_event(self, event: EngineEvent) -> None:
        """What the engine and the library tell while they start, and when the engine is replaced."""
        if isinstance(event, LoadProgress):
            self._bar.update(self._task, description=event.stage, total=1.0, completed=event.fraction)
            if event.stage != self._stage and not self._console.is_terminal:
                self.say(event.stage)
            self._stage = event.stage
        elif isinstance(event, StateChange) and event.state is EngineState.RESTARTING:
            self.say(f"{event.message}; its prompts are tried again")

    def on_answer(self, num_done: int, num_failed: int, num_tokens: int) -> None:
        failed = f", {num_failed} failed" if num_failed else ""
        description = f"{num_done} answers, {num_tokens} tokens{failed}"
        self._bar.update(self._task, description=description, total=None)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def close(self) -> None:
        self._bar.stop()

    def __enter__(self) -> OfflineProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
