"""One method of an AdapterHub adapter, planned: what it becomes, before a tensor is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from peft_core.forms import AdapterForms
from peft_core.methods.base_weights import BaseWeights
from peft_core.methods.report import FormName, MatchedSite
from peft_core.methods.tensors import TensorSource, read_finite


@dataclass(frozen=True, slots=True)
class Reader:
    """Where a part's numbers come from."""

    tensors: TensorSource
    base: BaseWeights | None

    def read(self, tensor: str) -> torch.Tensor:
        """A tensor by its name in the file, float32. Raises MalformedAdapter where a value is NaN or infinite."""
        return read_finite(self.tensors, tensor)


class PartPlan(Protocol):
    @property
    def sites(self) -> tuple[MatchedSite, ...]: ...

    @property
    def forms(self) -> tuple[FormName, ...]: ...

    @property
    def needs_base(self) -> bool: ...

    @property
    def num_parameters(self) -> int: ...

    @property
    def copies(self) -> tuple[str, ...]:
        """Tensors that only repeat others."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]: ...

    def read(self, reader: Reader) -> AdapterForms: ...
