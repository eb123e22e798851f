"""From a directory in some other format to one that can be served.

    adapter_model.bin          pickled PEFT            -> adapter_model.safetensors
    pytorch_adapter.bin        pickled AdapterHub      -> adapter.safetensors
    adapters.safetensors       MLX                     -> PEFT
    PiSSA, OLoRA, ...          with the base at hand   -> LoRA that needs no base
    anything that is served                            -> the same files
    *.gguf                                             refused

The destination is written beside its place and moved there whole, so a conversion that fails leaves nothing.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from adapters_store.staging import (
    CONFIG_FILE,
    HUB_HEAD_FILE,
    HUB_WEIGHTS_FILE,
    MLX_WEIGHTS_FILE,
    WEIGHTS_FILE,
    is_allowed,
)
from peft_core.errors import AdapterError
from peft_core.methods import check, decode
from server.convert.errors import ConversionRefused
from server.convert.mlx import from_mlx, is_mlx
from server.convert.pickle_file import unpickle
from server.convert.plain_lora import plain_lora
from server.library.directory import adapter_in
from server.loader.adapter_tensors import AdapterTensors
from server.loader.base_files import BaseOnDisk
from server.loader.prepare import read_config

_PICKLES = {
    "adapter_model.bin": WEIGHTS_FILE,
    "pytorch_adapter.bin": HUB_WEIGHTS_FILE,
    "pytorch_model_head.bin": HUB_HEAD_FILE,
}
_GGUF = (
    "GGUF is not converted: it keeps neither rsLoRA nor scalings per module, and permutes the rows of some matrices. "
    "Use the adapter that the GGUF was made from."
)


@dataclass(slots=True)
class Conversion:
    """What was done, in sentences."""

    steps: list[str] = field(default_factory=list)


def convert(source: Path, destination: Path, base: Path | None = None) -> Conversion:
    """Makes `destination` an adapter that can be served.

    Args:
        source: a directory, or a folder that holds one adapter's.
        destination: does not exist yet, or is empty.
        base: directory of the base model; with it, whatever is low-rank in the end becomes plain LoRA.

    Raises:
        ConversionRefused: it cannot be converted; nothing was written.
        AdapterError, AdapterRefused, StoreError, OSError: the source is unsound; nothing was written.
    """
    home = _home_of(source)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConversionRefused(f"{destination} exists already. Name a directory that does not.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        done = _convert_into(home, work)
        if base is not None:
            _make_plain(work, base, done)
        if destination.exists():
            destination.rmdir()
        work.chmod(0o755)
        work.rename(destination)
        return done
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _home_of(source: Path) -> Path:
    if source.suffix == ".gguf":
        raise ConversionRefused(_GGUF)
    if not source.is_dir():
        raise ConversionRefused(f"{source} is no directory. Name the one that holds {CONFIG_FILE}.")
    home = adapter_in(source)
    if not (home / CONFIG_FILE).is_file():
        if any(home.glob("*.gguf")):
            raise ConversionRefused(_GGUF)
        raise ConversionRefused(f"{source} holds no adapter: {CONFIG_FILE} is missing.")
    return home


def _convert_into(home: Path, work: Path) -> Conversion:
    done = Conversion()
    config = read_config(home / CONFIG_FILE)
    if is_mlx(config):
        return _convert_mlx(home, work, config, done)
    for path in sorted(home.iterdir()):
        if path.is_file() and is_allowed(path.name):
            shutil.copyfile(path, work / path.name)
    for name, safe_name in _PICKLES.items():
        if (home / name).is_file() and not (work / safe_name).exists():
            num_tensors = unpickle(home / name, work / safe_name)
            done.steps.append(f"read {num_tensors} tensors of {name} without running its code, as {safe_name}")
    if not any((work / name).exists() for name in (WEIGHTS_FILE, HUB_WEIGHTS_FILE)):
        raise ConversionRefused(f"{home} holds no weights; expected one of {WEIGHTS_FILE}, {', '.join(_PICKLES)}.")
    if not done.steps:
        done.steps.append("copied the files: nothing in them needs converting")
    return done


def _convert_mlx(home: Path, work: Path, config: Mapping[str, Any], done: Conversion) -> Conversion:
    weights = home / MLX_WEIGHTS_FILE
    if not weights.is_file():
        raise ConversionRefused(f"this is an MLX adapter, and {MLX_WEIGHTS_FILE} is missing.")
    found = AdapterTensors({WEIGHTS_FILE: str(weights)})  # its header is checked before anything reads it
    made = from_mlx(config, {name: found.get(name) for name in found.header})
    _write(work, made.config, made.tensors)
    done.steps.append(
        f"turned an MLX adapter of {len(made.config['target_modules'])} modules into PEFT's format: matrices "
        f"transposed, the scale written as alpha {made.config['lora_alpha']:g} of rank {made.config['r']}"
    )
    if made.config["base_model_name_or_path"] is None:
        done.steps.append("the base is not named in it; the adapter says nothing of which model it is for")
    return done


def _make_plain(work: Path, base: Path, done: Conversion) -> None:
    """Rewrites a low-rank adapter as plain LoRA, where it is not one already."""
    config = read_config(work / CONFIG_FILE)
    tensors = AdapterTensors({path.name: str(path) for path in work.iterdir()})
    on_disk = BaseOnDisk.open(base)
    try:
        report = check(config, tensors.header, on_disk.spec)
        if report.kind == "LORA" and not report.needs_base:
            done.steps.append("the base was not needed: this LoRA is complete without it")
            return
        forms, _ = decode(config, tensors, on_disk.spec, on_disk.weights)
    except AdapterError as error:
        raise ConversionRefused(
            f"it cannot be rewritten as plain LoRA on this base: {error} To convert its files only, leave --base out."
        ) from error
    plain, made = plain_lora(config, forms, report.kind)
    _write(work, plain, made)
    for name in (HUB_WEIGHTS_FILE, HUB_HEAD_FILE, "head_config.json"):  # the head beside it is the base's own
        (work / name).unlink(missing_ok=True)
    ranks = sorted({delta.rank for delta in forms.linear.values()})
    done.steps.append(
        f"rewrote {report.kind} as plain LoRA of rank {', '.join(map(str, ranks))} with the base's weights; "
        "it needs no conversion and no base any more"
    )


def _write(work: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    (work / CONFIG_FILE).write_text(json.dumps(dict(config), indent=2) + "\n")
    save_file(dict(tensors), work / WEIGHTS_FILE, metadata={"format": "pt"})
