"""The guided tour behind `veneer demo`: one base, adapters of every family in one batch, and a hot swap under load.

Starts a server of its own, shows six things on it, stops it, and returns 0 when all of them went
as promised. Needs no terminal: without one it prints the same, without movement.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from server.demo import ADAPTER_NAMES, ADAPTER_REGISTERS, ADAPTERS_DIR, BASE_DIR, BASE_NAME, EXAMPLE_PROMPT
from server.demo.corpus import questions
from server.demo.household import Household, ServerFailed
from server.demo.judge import judge
from server.demo.readers import Readers
from server.demo.registers import PLAIN
from server.demo.scrape import read_out
from server.demo.tables import Heard, answers_table, kinds_table, pace_table
from server.demo.visitor import Refused, Visitor

GUEST = "french"  # the adapter that is not there at first
MAX_NEW_TOKENS = 160
WATCH_S = 3.0  # how long the streams are watched undisturbed
NUM_SWAPS = 6
LEAST_SHARE_RIGHT = 0.9  # of the streams' answers, else the tour fails
QUESTION_SEED = 515
_BASE = "base"
_FIRST = ("json", "pirate", "shout")  # who answers first: plain LoRA, one voice each
_STREAMING = (None, *_FIRST, "bard-prefix", "list-ia3", "robot-bottleneck")  # read during the swaps; None: the base


class Tour:
    """The tour's acts, in their order; each prints what it does and raises when the server does otherwise."""

    def __init__(self, console: Console, visitor: Visitor) -> None:
        self._console = console
        self._visitor = visitor

    def run(self) -> None:
        self.side_by_side()
        self.every_kind()
        self.arrive()
        self.swap()
        self.leave()
        self.count()

    def side_by_side(self) -> None:
        self._head("1", "One question, one base, several adapters, one batch")
        self._say(f"[bold]{escape(EXAMPLE_PROMPT.strip())}[/]\n")
        answers = dict.fromkeys((_BASE, *_FIRST), "")

        def read(name: str) -> None:
            adapter = None if name == _BASE else name
            for token in self._visitor.stream(EXAMPLE_PROMPT, adapter, max_new_tokens=MAX_NEW_TOKENS):
                answers[name] += token.text
                if token.generated_text is not None:
                    answers[name] = token.generated_text

        with ThreadPoolExecutor(len(answers)) as pool:
            readings = [pool.submit(read, name) for name in answers]
            if self._console.is_terminal:
                with Live(console=self._console, refresh_per_second=20) as live:
                    while not all(reading.done() for reading in readings):
                        live.update(answers_table(answers))
                        time.sleep(0.03)
                    live.update(answers_table(answers))
            for reading in readings:
                reading.result()
        if not self._console.is_terminal:
            self._console.print(answers_table(answers))

    def every_kind(self) -> None:
        """Everyone at once, each kind with its own mathematics; the judge reads every answer."""
        listed = {adapter["name"]: adapter["versions"][0] for adapter in self._visitor.adapters()}
        self._head("2", f"Every family of adapters in one batch: the base and {len(listed)} adapters answer at once")
        (question,) = questions(QUESTION_SEED, 1)
        self._say(f"[bold]{escape(question.prompt.strip())}[/]\n")

        def hear(name: str) -> Heard:
            adapter = None if name == _BASE else name
            answer = self._visitor.generate(question.prompt, adapter, max_new_tokens=MAX_NEW_TOKENS)
            verdict = judge(ADAPTER_REGISTERS.get(name, PLAIN), question.recipe, answer)
            report: dict[str, Any] = listed[name]["report"] if adapter else {"kind": "", "forms": []}
            return Heard(name, report["kind"], report["forms"], answer, verdict.accepted)

        with ThreadPoolExecutor(len(listed) + 1) as pool:
            heard = list(pool.map(hear, (_BASE, *listed)))
        self._console.print(kinds_table(heard))
        num_right = sum(one.is_right for one in heard)
        self._say(f"The judge finds {num_right} of {len(heard)} answers right: the voice asked for, and every number.")
        if num_right < LEAST_SHARE_RIGHT * len(heard):
            raise RuntimeError("too many answers of the mixed batch are wrong; the adapters disturb each other")

    def arrive(self) -> None:
        self._head("3", f"A new adapter arrives: upload {GUEST!r}, ask it, without a restart")
        directory = ADAPTERS_DIR / GUEST
        size_bytes = sum(file.stat().st_size for file in directory.iterdir())
        started_s = time.monotonic()
        self._visitor.upload(GUEST, directory)
        uploaded_s = time.monotonic()
        answer = self._visitor.generate(EXAMPLE_PROMPT, GUEST, max_new_tokens=MAX_NEW_TOKENS)
        answered_s = time.monotonic()
        self._say(
            f"{size_bytes / 1e6:.1f} MB uploaded, checked and committed in {(uploaded_s - started_s) * 1000:.0f} ms;"
        )
        self._say(f"its first answer was complete {(answered_s - uploaded_s) * 1000:.0f} ms later:\n")
        self._console.print(answers_table({GUEST: answer}))

    def swap(self) -> None:
        self._head(
            "4",
            f"Hot swap: {len(_STREAMING)} streams run while {GUEST!r} is evicted and loaded again, {NUM_SWAPS} times",
        )
        with Readers(self._visitor, _STREAMING) as readers:
            time.sleep(0.5)
            calm_s = time.monotonic()
            time.sleep(WATCH_S)
            busy_s = time.monotonic()
            for _ in range(NUM_SWAPS):
                self._visitor.evict(GUEST)
                self._visitor.generate(EXAMPLE_PROMPT, GUEST, max_new_tokens=MAX_NEW_TOKENS)
            end_s = time.monotonic()
            before, during = readers.pace(calm_s, busy_s), readers.pace(busy_s, end_s)
        self._console.print(pace_table(before, during))
        self._say(
            f"The streams brought {readers.num_answers} answers; the judge finds {readers.num_right} of them right."
        )
        if readers.num_right < LEAST_SHARE_RIGHT * readers.num_answers:
            raise RuntimeError("too many of the streams' answers are wrong; the swap disturbed them")

    def leave(self) -> None:
        self._head("5", f"Evict, then delete: {GUEST!r} leaves, everyone else stays")
        self._visitor.evict(GUEST)
        self._say("evicted: its memory is free, its files are kept; the next request would load it again")
        self._visitor.delete(GUEST)
        try:
            self._visitor.generate(EXAMPLE_PROMPT, GUEST)
        except Refused as refused:
            self._say(f"deleted: asking for it now is refused: [italic]{escape(str(refused))}[/]")
        else:
            raise RuntimeError(f"the deleted adapter {GUEST!r} still answers")

    def count(self) -> None:
        self._head("6", "What /metrics says about all this")
        for family, value, meaning in read_out(self._visitor.metrics()):
            self._say(f"  [bold]{escape(value)}[/]  {escape(meaning)}  [dim]{escape(family)}[/]")

    def _head(self, number: str, text: str) -> None:
        self._console.print(f"\n[bold reverse] {number} [/] [bold]{escape(text)}[/]\n", highlight=False)

    def _say(self, markup: str) -> None:
        self._console.print(markup, highlight=False)


def take_tour(console: Console | None = None) -> int:
    """The whole tour; returns the exit code: 0, or 1 with the reason printed."""
    console = console or Console()
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="veneer-demo-") as scratch:
        adapters = str(_without_guest(Path(scratch)))
        house = Household(Path(scratch), (str(BASE_DIR), "--served-model-name", BASE_NAME, "--adapters-dir", adapters))
        try:
            with ExitStack() as stack:
                with console.status("Starting a server with the built-in base ..."):
                    stack.enter_context(house)
                console.print(f"A server with the built-in base is ready at {house.url} ({_since(started_s)}).")
                Tour(console, Visitor(house.url)).run()
        except (ServerFailed, Refused, OSError, RuntimeError, ValueError) as error:
            console.print(f"\nThe tour ends here: {error}", style="red", markup=False)
            console.print(house.last_words(), style="dim", markup=False)
            return 1
    if house.exit_code != 0:
        console.print(f"The server ended with code {house.exit_code}.", style="red")
        return 1
    console.print(f"\nThe server has drained and ended. The tour took {_since(started_s)}.")
    console.print("[bold]veneer serve[/] starts one that stays; [bold]veneer serve --help[/] says what it takes.")
    return 0


def _without_guest(scratch: Path) -> Path:
    """A directory of the built-in adapters but for the one that is to be uploaded."""
    directory = scratch / "adapters"
    for name in ADAPTER_NAMES:
        if name != GUEST:
            shutil.copytree(ADAPTERS_DIR / name, directory / name)
    return directory


def _since(started_s: float) -> str:
    return f"{time.monotonic() - started_s:.1f} s"
