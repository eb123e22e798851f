"""The base model's linear product, packed for the device once, whole groups at a time.

On CPU the weight is kept in oneDNN's blocked layout (the operators that torch's own compiler
emits), which reads it about twice as fast as a plain `linear` on few rows and gives a row the same
bits whatever the number of rows; of a single row it sums long inputs (float32, above 1024) in another
order, so such a row is computed twice. Where those operators are missing, and on other devices, the
product is plain. Modules that are not exactly a linear layer (quantised ones) stay black boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D


class BaseProduct(Protocol):
    """y = base(x) for a whole group: [rows, in_features] -> [rows, sum(out_features)]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def weight(self, member: int) -> torch.Tensor:
        """The logical [out_features, in_features] weight of one member, unpacked on demand."""

    def bias(self, member: int) -> torch.Tensor | None: ...


class PackedProduct:
    """oneDNN-prepacked weights; the original tensors are not kept."""

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        self._outs = [len(weight) for weight in weights]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(tuple(weights)).contiguous(), None)
        self._bias = _stack_biases(weights, biases)
        self._has_bias = [bias is not None for bias in biases]
        self._is_single_row_odd = self._sums_a_single_row_differently(weights[0])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_single_row_odd and len(x) == 1:
            return self._product(x.expand(2, -1))[:1]
        return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return product

    def _sums_a_single_row_differently(self, weight: torch.Tensor) -> bool:
        rows = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        return not torch.equal(self._product(rows[:1]), self._product(rows)[:1])

    def weight(self, member: int) -> torch.Tensor:
        members: tuple[torch.Tensor, ...] = self._packed.to_dense().split(self._outs)
        return members[member]

    def bias(self, member: int) -> torch.Tensor | None:
        return _member_bias(self._bias, self._outs, member) if self._has_bias[member] else None


class PlainProduct:
    """One plain linear product over the stacked weights."""

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        self._outs = [len(weight) for weight in weights]
        self._weight = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
        self._bias = _stack_biases(weights, biases)
        self._has_bias = [bias is not None for bias in biases]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._weight, self._bias)

    def weight(self, member: int) -> torch.Tensor:
        members: tuple[torch.Tensor, ...] = self._weight.split(self._outs)
        return members[member]

    def bias(self, member: int) -> torch.Tensor | None:
        return _member_bias(self._bias, self._outs, member) if self._has_bias[member] else None


class ModuleProduct:
    """A linear module of a kind we do not open (a quantised one): called as it is."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._module(x)
        return product

    def weight(self, member: int) -> torch.Tensor:
        return self._module.get_parameter("weight")

    def bias(self, member: int) -> torch.Tensor | None:
        return getattr(self._module, "bias", None)


def can_stack(module: nn.Module) -> bool:
    """Whether the module's weight may be taken out of it and stacked with its siblings'."""
    return type(module) in (nn.Linear, Conv1D)


def base_product(modules: Sequence[nn.Module]) -> BaseProduct:
    """The product of one group of modules that read the same input."""
    if not all(can_stack(module) for module in modules):
        assert len(modules) == 1, "black boxes are never grouped"
        return ModuleProduct(modules[0])
    weights = [_logical_weight(module) for module in modules]
    biases = [module.bias.detach() if isinstance(module.bias, torch.Tensor) else None for module in modules]
    return (PackedProduct if _can_pack(weights[0]) else PlainProduct)(weights, biases)


def _logical_weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _member_bias(bias: torch.Tensor | None, outs: list[int], member: int) -> torch.Tensor:
    assert bias is not None
    members: tuple[torch.Tensor, ...] = bias.split(outs)
    return members[member]


def _stack_biases(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in pairs])
