"""What a decoder tells about an adapter: what was matched, what was set aside and why, what looks odd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from peft_core.forms import AdapterForms

FormName = Literal[
    "low rank",
    "gain",
    "shift",
    "input gain",
    "rotation",
    "turn",
    "dense",
    "kron",
    "replacement",  # of a whole linear or of the head
    "embedding",  # anything at an embedding table
    "head rows",
    "norm",
    "bottleneck",
    "experts",
    "prefix",
    "virtual tokens",
]


@dataclass(frozen=True, slots=True)
class MatchedSite:
    path: str
    rank: int  # 0 where the change is not low-rank
    scaling: float


@dataclass(frozen=True, slots=True)
class DecodeReport:
    kind: str  # as `peft_type` says it
    sites: tuple[MatchedSite, ...]  # in the base model's order
    num_parameters: int
    irrelevant_fields: Mapping[str, str]  # field of the config -> why it does not change the outputs
    irrelevant_tensors: tuple[str, ...]  # kept by training, without effect on the outputs
    warnings: tuple[str, ...]  # sentences for whoever uploaded it
    forms: tuple[FormName, ...] = ("low rank",)  # what it becomes, each once
    needs_base: bool = False  # decoding reads weights of the base
    dense_bytes: int = 0  # float32, of dense updates; replaced modules are not counted

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its low-rank sites, ascending."""
        return tuple(sorted({site.rank for site in self.sites if site.rank}))

    def to_json(self) -> dict[str, Any]:
        """Plain data, ranks included."""
        return {
            "kind": self.kind,
            "ranks": list(self.ranks),
            "sites": [asdict(site) for site in self.sites],
            "num_parameters": self.num_parameters,
            "irrelevant_fields": dict(self.irrelevant_fields),
            "irrelevant_tensors": list(self.irrelevant_tensors),
            "warnings": list(self.warnings),
            "forms": list(self.forms),
            "needs_base": self.needs_base,
            "dense_bytes": self.dense_bytes,
        }


class Decoded(NamedTuple):
    forms: AdapterForms
    report: DecodeReport
