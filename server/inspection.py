"""What an adapter's directory holds and whether it would be served, found out without a server.

    inspect(Path("out/pirate"))                  headers and config only, no torch
    inspect_on(Path("out/pirate"), "org/base")   as a server of that base would take it: checked, decoded, packed,
                                                 loaded, and asked how far it moves the base

Running example:
    inspect(...).to_json() == {"kind": "LORA", "ranks": [16], ..., "served": True, "reason": None}
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters_store.header import Header, read_header
from adapters_store.staging import CONFIG_FILE, TENSOR_FILES, check_path, is_allowed
from peft_core.traits import AdapterTraits
from server.engine.description import EngineDescription
from server.engine.request import AdapterTicket
from server.library.directory import adapter_in
from server.library.probe import Probe
from server.loader.errors import AdapterRefused
from server.loader.job import PackingTarget, Prepared, PrepareJob

_SHOWN_FIELDS = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "modules_to_save", "num_virtual_tokens")
_POOL_BYTES = 512 << 20  # beside the adapter itself: a few blocks for one short row
_FACTORS = ("lora_A.weight", "lora_B.weight")


@dataclass(slots=True)
class Inspection:
    """`served` is None where it cannot be said without a base."""

    facts: dict[str, Any]
    served: bool | None = None
    reason: str | None = None  # why it would be refused
    report: dict[str, Any] = field(default_factory=dict)  # the load report, on a base

    def to_json(self) -> dict[str, Any]:
        told = {**self.facts, "served": self.served, "reason": self.reason}
        return {**told, "report": self.report} if self.report else told


def inspect(directory: Path) -> Inspection:
    """Config and headers, without loading a tensor.

    Raises:
        StoreError, OSError, ValueError: it is no adapter, or is unsound.
    """
    home = adapter_in(directory)
    config = _config_of(home)
    names = sorted(path.name for path in home.iterdir() if path.is_file())
    headers = {name: read_header(home / name) for name in names if name in TENSOR_FILES}
    if not headers:
        _refuse_other_weights(names)
        raise ValueError(f"no weights: none of {', '.join(TENSOR_FILES)} is there.")
    tensors = [entry for header in headers.values() for entry in header.tensors.values()]
    facts = {
        "kind": _kind_of(config),
        **{name: config[name] for name in _SHOWN_FIELDS if config.get(name) is not None},
        "ranks": _ranks_of(headers),
        "base_model": config.get("base_model_name_or_path") or config.get("model_name"),
        "tensors": len(tensors),
        "dtypes": ", ".join(sorted({tensor.dtype for tensor in tensors})),
        "bytes": sum((home / name).stat().st_size for name in headers),
        "left_out": ", ".join(name for name in names if not is_allowed(name)) or "-",
    }
    return Inspection(facts)


def inspect_on(directory: Path, base: str, revision: str | None = None) -> Inspection:
    """As a server of `base` would take it; loads that model.

    Raises:
        StoreError, OSError, ValueError: as `inspect`.
        EngineStartError: the base cannot be served.
    """
    found = inspect(directory)
    asyncio.run(_check_on(found, adapter_in(directory), base, revision))
    return found


async def _check_on(found: Inspection, home: Path, base: str, revision: str | None) -> None:
    from server.engine.assembly import build_engine  # torch, and seconds to import
    from server.engine.config import EngineConfig
    from server.engine.local import start_local

    num_bytes = 2 * int(found.facts["bytes"]) + _POOL_BYTES
    config = EngineConfig(base, revision=revision, pool_bytes=num_bytes, max_num_seqs=2)
    engine = await start_local(config, build_engine)
    try:
        with tempfile.TemporaryDirectory(prefix="veneer-inspect-") as work:
            prepared = _prepare(found, home, engine.description, f"{work}/image")
            if prepared is None:
                return
            traits = AdapterTraits.from_json(prepared.report["traits"])
            ticket = AdapterTicket(prepared.effect_digest, home.name, f"{work}/image", prepared.num_bytes, traits)
            found.report = await Probe(engine).add_to(prepared.report, ticket)
    finally:
        await engine.close()


def _prepare(found: Inspection, home: Path, base: EngineDescription, image_path: str) -> Prepared | None:
    from server.loader.prepare import Packer

    target = PackingTarget(base.spec, base.adapter_dtype, base.base_directory, base.dtype)
    files = {path.name: str(path) for path in home.iterdir() if path.is_file() and is_allowed(path.name)}
    try:
        prepared = Packer(target).prepare(PrepareJob(files, image_path))
    except AdapterRefused as error:
        found.served, found.reason = False, error.message
        return None
    found.served = True
    return prepared


def _config_of(home: Path) -> dict[str, Any]:
    if not (home / CONFIG_FILE).exists() and any(home.glob("*.gguf")):
        check_path(next(home.glob("*.gguf")).name)
    config = json.loads((home / CONFIG_FILE).read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_FILE} holds a {type(config).__name__}; expected an object")
    return config


def _refuse_other_weights(names: list[str]) -> None:
    """Raises FileRefused with the advice for a format that must be converted first."""
    for name in names:
        if name.endswith((".bin", ".gguf")) or name == "adapters.safetensors":
            check_path(name)


def _kind_of(config: Mapping[str, Any]) -> str:
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind:
        return kind
    nested = config.get("config")
    if isinstance(nested, Mapping):
        return f"AdapterHub {nested.get('architecture') or 'bottleneck'}"
    return "unknown"


def _ranks_of(headers: Mapping[str, Header]) -> list[int]:
    """Ranks as the factors of LoRA and its relatives show them; empty for other kinds."""
    shapes = [
        (name, entry.shape)
        for header in headers.values()
        for name, entry in header.tensors.items()
        if name.endswith(_FACTORS) and len(entry.shape) == 2
    ]
    return sorted({shape[0] if "lora_A" in name else shape[1] for name, shape in shapes})
