"""What it takes to load an adapter of each kind, once and again: files, weights of the base, decoding, packing.

The first time an adapter's files are read, decoded and packed into an image, which is kept; some kinds also read
weights of the base for it (DoRA the norms of its rows, PiSSA its first singular vectors). From then on, whenever the
adapter has left the device or the server was started anew, the image is read into place as it is, whatever the kind.

Files are in the page cache in every round, since they were just written: what is compared is work, not a disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from adapters_store.staging import TENSOR_FILES
from bench.conditions import conditions
from bench.kind_adapters import KINDS, KINDS_WITH_BASE, NUM_VIRTUAL, RANK, REDUCTION, kind_directory
from bench.models import STANDARD, TINY, base_directory
from bench.report import Report, Series, flags, progress
from bench.statistics import spread
from peft_core.image import pack, read_header, write_image
from peft_core.methods import decode
from peft_core.spec import BaseModelSpec
from server.engine.assembly import build_engine
from server.engine.config import EngineConfig
from server.loader.adapter_tensors import AdapterTensors
from server.loader.base_weights import BaseFiles
from server.loader.prepare import read_config

ALL_KINDS = (*KINDS, *KINDS_WITH_BASE)


@dataclass(frozen=True, slots=True)
class Loading:
    """Milliseconds of one load."""

    read: float  # the adapter's files
    base: float  # weights of the base
    decode: float  # without both
    pack: float  # lay out, write
    again: float  # read the image into memory that is there, compare its checksum


class _Clock:
    def __init__(self) -> None:
        self.ms = 0.0

    def time(self, call: Callable[[], Any]) -> Any:
        start_s = time.perf_counter()
        result = call()
        self.ms += (time.perf_counter() - start_s) * 1e3
        return result


class _TimedTensors:
    def __init__(self, directory: Path, clock: _Clock) -> None:
        files = {name: str(directory / name) for name in TENSOR_FILES if (directory / name).exists()}
        self._clock = clock
        self._tensors: AdapterTensors = clock.time(lambda: AdapterTensors(files))
        self.header = self._tensors.header

    def get(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._clock.time(lambda: self._tensors.get(name).clone())
        return tensor


class _TimedBase:
    def __init__(self, files: BaseFiles, clock: _Clock) -> None:
        self._files, self._clock = files, clock

    def weight(self, path: str) -> torch.Tensor:
        weight: torch.Tensor = self._clock.time(lambda: self._files.weight(path))
        return weight

    def bias(self, path: str) -> torch.Tensor | None:
        bias: torch.Tensor | None = self._clock.time(lambda: self._files.bias(path))
        return bias


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__ or "", rounds=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of base and adapters")
    arguments = parser.parse_args(argv)
    shape = TINY if arguments.quick else STANDARD

    base = base_directory(shape, arguments.cache)
    _, description = build_engine(
        EngineConfig(model=str(base), dtype=arguments.dtype, num_threads=arguments.threads),
        lambda stage, _: progress(f"engine: {stage}"),
    )
    torch.set_num_threads(arguments.threads or 1)  # one in the server's loader, which works beside the engine
    spec = BaseModelSpec.from_json(description.spec)
    files = BaseFiles(base, spec, getattr(torch, arguments.dtype))
    directories = {kind: kind_directory(shape, kind, 0, arguments.cache) for kind in ALL_KINDS}
    loads: dict[str, list[Loading]] = {kind: [] for kind in ALL_KINDS}
    sizes: dict[str, float] = {}
    rounds = 2 if arguments.quick else arguments.rounds
    for number in range(-1, rounds):  # the first is not counted
        for kind, directory in directories.items():
            progress(f"round {number + 1}/{rounds}: {kind}")
            one, sizes[kind] = load(directory, spec, files, description.adapter_dtype)
            loads[kind] += [one] if number >= 0 else []
    progress("")
    deliver(arguments, shape.name, loads, sizes)


def load(directory: Path, spec: BaseModelSpec, base: BaseFiles, dtype: str) -> tuple[Loading, float]:
    """One first load and one further; also the image's megabytes."""
    read, weights, packing, again = (_Clock() for _ in range(4))
    start_s = time.perf_counter()
    tensors = _TimedTensors(directory, read)
    forms = decode(read_config(directory / "adapter_config.json"), tensors, spec, _TimedBase(base, weights)).forms
    decoding_ms = (time.perf_counter() - start_s) * 1e3 - read.ms - weights.ms
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "adapter.img"
        image = packing.time(lambda: pack(forms, spec, dtype))
        packing.time(lambda: write_image(path, image))
        room = bytearray(image.num_bytes)
        again.time(lambda: _read_again(path, room))
    return Loading(read.ms, weights.ms, decoding_ms, packing.ms, again.ms), image.num_bytes / 1e6


def _read_again(path: Path, room: bytearray) -> None:
    """As the engine does when the adapter comes back: into its place, and checked."""
    header, start = read_header(path)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        file.readinto(room)
    if zlib.crc32(room) != header["crc32"]:
        raise RuntimeError(f"{path.name} does not have the checksum that it was written with")


def deliver(arguments: argparse.Namespace, base: str, loads: dict[str, list[Loading]], sizes: dict[str, float]) -> None:
    facts = conditions(
        dtype=arguments.dtype,
        base=base,
        adapters=f"LoRA, DoRA, PiSSA rank {RANK}, prefixes of {NUM_VIRTUAL} tokens, "
        f"bottlenecks of hidden size / {REDUCTION}",
        rounds=len(next(iter(loads.values()))),
    )
    headers = ("kind", "MB on the device", "read ms [quartiles]", "base ms", "decode ms", "pack ms", "again ms")
    report = Report("loading", facts, headers)
    for kind, many in loads.items():
        parts = (spread([getattr(one, part.name) for one in many]) for part in fields(Loading))
        report.add((kind, sizes[kind], *parts))
    report.findings = [
        "again: the image is read into place and checked; no kind reads the base or decodes a second time"
    ]
    report.raw = {
        kind: {part.name: [getattr(one, part.name) for one in many] for part in fields(Loading)}
        for kind, many in loads.items()
    }
    firsts = {
        kind: spread([one.read + one.base + one.decode + one.pack for one in many]) for kind, many in loads.items()
    }
    agains = {kind: spread([one.again for one in many]) for kind, many in loads.items()}
    panels = [
        Series(title, list(one), [v.median for v in one.values()], [v.low for v in one.values()],
               [v.high for v in one.values()])
        for title, one in (("first load, ms", firsts), ("again, ms", agains))
    ]  # fmt: skip
    report.deliver(arguments, panels)


if __name__ == "__main__":
    main()
