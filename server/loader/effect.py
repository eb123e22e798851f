"""Identity of what an adapter does: equal digests mean equal outputs on the same base.

Taken over the fields of the config that matter, in a canonical form, and over the tensors that matter, by name. The
order of tensors in the file, metadata, spacing, random order of lists that are sets, and fields that only steer
training or say who wrote the file do not change it. The order of everything else does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

from adapters_store.header import TensorEntry

_NAMES_ONLY = frozenset(
    {"base_model_name_or_path", "task_type"}
)  # compared in a warning or refused, never computed with
_SETS = frozenset(  # PEFT writes them in random order
    {
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "feedforward_modules",
        "layers_to_transform",
        "layers_pattern",
    }
)
_SCHEMA = "effect-2"


class StoredTensors(Protocol):
    """The tensors of an adapter as bytes."""

    @property
    def header(self) -> Mapping[str, Any]: ...

    def entry(self, name: str) -> TensorEntry: ...

    def chunks(self, name: str) -> Iterator[bytes]: ...


def effect_digest(
    config: Mapping[str, Any],
    tensors: StoredTensors,
    irrelevant_fields: Collection[str] = (),
    irrelevant_tensors: Collection[str] = (),
) -> str:
    """The digest, "sha256:..."; `irrelevant_*` are what its decoder set aside. Reads every tensor once."""
    digest = hashlib.sha256(f"{_SCHEMA}\n{canonical_config(config, irrelevant_fields)}\n".encode())
    for name in sorted(set(tensors.header) - set(irrelevant_tensors)):
        entry = tensors.entry(name)
        digest.update(f"{json.dumps(name)} {entry.dtype} {list(entry.shape)}\n".encode())
        for chunk in tensors.chunks(name):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def canonical_config(config: Mapping[str, Any], irrelevant_fields: Collection[str] = ()) -> str:
    """The fields that matter as one line of JSON. Fields that are absent, null or empty are the same.

    Whatever may have an order keeps it (the first pattern that matches wins, the i-th row is of the i-th token); only
    the lists that are known to be sets are sorted.
    """
    kept = {
        field: sorted(value, key=json.dumps) if field in _SETS and isinstance(value, list) else _in_order(value)
        for field, value in config.items()
        if field not in irrelevant_fields and field not in _NAMES_ONLY and value not in (None, "", [], {})
    }
    return json.dumps(kept, sort_keys=True, separators=(",", ":"))


def _in_order(value: Any) -> Any:
    """Objects as lists of pairs, which `sort_keys` leaves alone."""
    if isinstance(value, dict):
        return [[key, _in_order(inner)] for key, inner in value.items()]
    if isinstance(value, list):
        return [_in_order(inner) for inner in value]
    return value
