"""Parameters of the base that an adapter replaces: trained modules, biases, embeddings, rows of tokens.

    base_model.model.<path>.weight | .bias                              replaced (modules_to_save, bias, new vocabulary)
    base_model.model.<path>.base_layer.weight | .base_layer.bias        the same, where the module is adapted as well
    base_model.model.<path>.token_adapter.trainable_tokens_delta        rows of single tokens; values, not differences

Stored are always the new values, never differences. A weight that equals the base's is dropped: PEFT saves whole
embeddings beside an adapter on them. Embedding and head are two modules, even where the base has one weight for both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from peft_core.errors import UnsupportedAdapter
from peft_core.forms import AdapterForms
from peft_core.methods.base_weights import BaseWeights
from peft_core.methods.report import FormName
from peft_core.methods.tensors import Header, TensorSource
from peft_core.methods.tuner_config import TunerConfig
from peft_core.spec import BaseModelSpec

_PARAMETER = re.compile(r"(?P<path>.+?)\.(?P<copy>base_layer\.)?(?P<parameter>weight|bias)")
_ROWS = re.compile(r"(?P<path>.+?)\.token_adapter\.trainable_tokens_delta")


@dataclass(frozen=True, slots=True)
class SavedModules:
    """Names of the tensors that replace parameters of the base."""

    weights: Mapping[str, str] = field(default_factory=dict)  # by module path
    biases: Mapping[str, str] = field(default_factory=dict)  # by module path
    token_rows: Mapping[str, str] = field(default_factory=dict)  # by path of the embedding or the head

    @classmethod
    def sort(cls, names: Iterable[tuple[str, str]], spec: BaseModelSpec, adapted: Collection[str]) -> SavedModules:
        """Args: names: pairs of a name without prefix, and the tensor's full name; adapted: paths the kind changes."""
        weights: dict[str, str] = {}
        biases: dict[str, str] = {}
        rows: dict[str, str] = {}
        for rest, name in names:
            if found := _ROWS.fullmatch(rest):
                rows[found["path"]] = name
            elif found := _PARAMETER.fullmatch(rest):
                (weights if found["parameter"] == "weight" else biases)[found["path"]] = name
            else:
                raise UnsupportedAdapter(f'tensor "{name}" is unknown here.', tensor=name)
        return cls(weights, biases, rows)

    @property
    def needs_base(self) -> bool:
        return bool(self.weights or self.biases)

    def check(self, config: TunerConfig, header: Header, spec: BaseModelSpec) -> SavedPlan:
        """Hold every replaced parameter against the base."""
        return SavedPlan(self, config, spec)


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """What `read` will make of the replaced parameters."""

    saved: SavedModules
    config: TunerConfig
    spec: BaseModelSpec
    forms: tuple[FormName, ...] = ()
    num_parameters: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def needs_base(self) -> bool:
        return self.saved.needs_base

    def read(self, tensors: TensorSource, base: BaseWeights | None) -> AdapterForms:
        """Replacements, shifts, norms, embeddings and rows; float32 on the host."""
        return AdapterForms()


def merged(first: AdapterForms, second: AdapterForms) -> AdapterForms:
    """The forms of both. Two changes of one module are put together; their shifts are added."""
    values: dict[str, Any] = {}
    for part in fields(AdapterForms):
        a, b = getattr(first, part.name), getattr(second, part.name)
        values[part.name] = _joined_maps(a, b) if isinstance(a, Mapping) else _either(part.name, a, b)
    return AdapterForms(**values)


def _joined_maps(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    both = {path: _joined(a[path], b[path]) for path in a if path in b}
    return {**a, **b, **both}


def _joined(a: Any, b: Any) -> Any:
    values = {part.name: _either(part.name, getattr(a, part.name), getattr(b, part.name)) for part in fields(a)}
    return replace(a, **values)


def _either(name: str, a: Any, b: Any) -> Any:
    """Whichever is given; both only of a shift, or where they are the same."""
    if name == "shift" and a is not None and b is not None:
        return a + b
    if a is None or (isinstance(a, tuple | int) and not a):
        return b
    is_given = b is not None and not (isinstance(b, tuple | int) and not b)
    assert not is_given or (not isinstance(a, torch.Tensor) and a == b), f"two values of {name} at one module"
    return a
