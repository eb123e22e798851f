"""One offline run from its options to its exit status.

    veneer generate demo --adapter pirate "How do I boil an egg?"
    veneer generate MODEL --adapter ./sql --adapter bard=./poet --input prompts.jsonl --format jsonl > answers.jsonl

Answers go to stdout (or a file), everything else to stderr, so that they can be piped.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

from adapters_store.errors import StoreError
from server.demo import ADAPTER_NAMES
from server.engine.request import SamplingParams
from server.front.errors import CannotStart
from server.front.front import Front
from server.library.errors import LibraryError
from server.offline import Totals, generate_into
from server.offline_input import Asked, Defaults, from_json_lines, from_prompts, from_text
from server.offline_progress import OfflineProgress
from server.setting_groups.values import LoraModule
from server.settings import Settings

BUILT_IN = "demo"  # a directory of this name can be given as ./demo
ANSWERED, SOME_FAILED, CANNOT_RUN, INTERRUPTED = 0, 1, 2, 130
STDIN = Path("-")
_PROMPTS_PER_SLOT = 2  # in flight for each that can run, so that the engine never waits for the next


class BadOptions(ValueError):
    """The options contradict each other, or name what is not there."""


@dataclass(frozen=True, slots=True)
class OfflineOptions:
    model: str  # directory, hub id or BUILT_IN
    prompts: tuple[str, ...]
    adapters: tuple[str, ...]  # DIR, NAME=DIR, or the name of a built-in one
    input_path: Path | None  # "-" is stdin
    output_path: Path | None  # None is stdout
    output_format: str  # plain | jsonl
    params: SamplingParams
    seed: int | None
    stop: tuple[str, ...]
    echo: bool
    is_ordered: bool
    is_quiet: bool
    store_dir: Path | None
    max_num_seqs: int
    engine: Mapping[str, Any]  # further settings by name


def run(options: OfflineOptions) -> int:
    """Run it; the exit status."""
    with ExitStack() as opened:
        progress = opened.enter_context(OfflineProgress(sys.stderr, is_quiet=options.is_quiet))
        try:
            totals = _run(options, progress, opened)
        except (BadOptions, CannotStart, LibraryError, StoreError, OSError, UnicodeDecodeError) as error:
            progress.close()
            print(f"veneer generate: {error}", file=sys.stderr)
            return CANNOT_RUN
        except KeyboardInterrupt:
            return INTERRUPTED
        progress.say(totals.summary)
    return SOME_FAILED if totals.num_failed else ANSWERED


def _run(options: OfflineOptions, progress: OfflineProgress, opened: ExitStack) -> Totals:
    if options.output_format not in ("plain", "jsonl"):
        raise BadOptions(f"--format is {options.output_format!r}; it must be plain or jsonl.")
    modules = [_module(text, options) for text in options.adapters]
    names = tuple(module.name for module in modules)
    defaults = Defaults(options.params, options.seed, options.stop, echo=options.echo, adapters=names)
    asked = _read(options, defaults, opened)
    store_dir = options.store_dir or Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="veneer-")))
    settings = _settings(options, store_dir, tuple(module for module in modules if module.path))
    out = sys.stdout
    if options.output_path is not None:
        out = opened.enter_context(options.output_path.open("w", encoding="utf-8"))
    return asyncio.run(_generate(settings, names, asked, out, options, progress))


async def _generate(
    settings: Settings,
    names: tuple[str, ...],
    asked: Iterator[Asked],
    out: TextIO,
    options: OfflineOptions,
    progress: OfflineProgress,
) -> Totals:
    front = await Front.start(settings, on_event=progress.on_event)
    try:
        for name in names:
            front.library.look_up(name)  # one that cannot be served ends the run before it begins
        return await generate_into(
            out,
            front,
            asked,
            as_json=options.output_format == "jsonl",
            max_in_flight=options.max_num_seqs * _PROMPTS_PER_SLOT,
            ordered=options.is_ordered,
            watcher=progress,
        )
    finally:
        await front.close()


def _settings(options: OfflineOptions, store_dir: Path, modules: tuple[LoraModule, ...]) -> Settings:
    try:
        return Settings(
            model=None if options.model == BUILT_IN else options.model,
            store_dir=store_dir,
            lora_modules=modules,
            max_num_seqs=options.max_num_seqs,
            max_queued_requests=options.max_num_seqs * _PROMPTS_PER_SLOT,
            **options.engine,
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        flag = "--" + str(problem["loc"][0]).replace("_", "-")
        raise BadOptions(f"{flag} is {problem['input']!r}: {problem['msg']}.") from error


def _read(options: OfflineOptions, defaults: Defaults, opened: ExitStack) -> Iterator[Asked]:
    path = options.input_path
    if options.prompts and path is not None:
        raise BadOptions("give prompts or --input, not both.")
    if options.prompts:
        return from_prompts(options.prompts, defaults)
    if path is None and sys.stdin.isatty():
        raise BadOptions("there is no prompt; give one, or --input FILE, or JSON lines on stdin.")
    if path is None or path == STDIN:
        # Not sys.stdin: a thread that still waits in it would hold a lock that the interpreter's end needs.
        return from_json_lines(os.fdopen(os.dup(0), encoding="utf-8"), defaults)
    lines = opened.enter_context(path.open(encoding="utf-8"))
    return from_json_lines(lines, defaults) if path.suffix == ".jsonl" else from_text(lines, defaults)


def _module(text: str, options: OfflineOptions) -> LoraModule:
    """Name and directory; a built-in adapter, registered anyway, has no directory."""
    name, equals, directory = text.partition("=")
    if not equals:
        if options.model == BUILT_IN and text in ADAPTER_NAMES:
            return LoraModule(text, "")
        name, directory = re.sub(r"[^A-Za-z0-9._-]", "-", Path(text).resolve().name), text
    if not Path(directory).is_dir():
        raise BadOptions(f"adapter {name!r}: there is no directory {directory}.")
    return LoraModule(name, directory)
