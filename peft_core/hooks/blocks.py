"""Bottlenecks beside attention and feed-forward blocks (`peft_core.forms.Bottleneck`).

The residual stream is added to a block's output by the model itself, after the block; what a bottleneck reads of the
stream is the input of the norm in front of the block. So there are two hooks: one keeps that input, one adds to the
output. The two matrix products are those of the low-rank form, with an activation between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from peft_core.activations import ACTIVATIONS
from peft_core.batch import Between, SlotRows
from peft_core.forms import Activation, AdapterForms, Bottleneck
from peft_core.kernels.invariance import padded_rows
from peft_core.kernels.vectors import add, row_index, vectors_by_row


class LowRankProducts(Protocol):
    """Add up(between(down u)) of the step's rows at this block: u [rows, width + 1], y [rows, width], in place."""

    def __call__(self, u: torch.Tensor, y: torch.Tensor, between: Between) -> None: ...


class BlockHooks:
    """The hooks of one block."""

    def __init__(
        self, path: str, parts: Sequence[SlotRows], forms: Mapping[int, AdapterForms], products: LowRankProducts,
        num_rows: int, like: torch.Tensor,
    ) -> None:  # fmt: skip
        """`like`: a tensor of the adapters' dtype on the device."""
        device, self._dtype = like.device, like.dtype
        own = [part for part in parts if path in forms[part.slot].bottlenecks]
        self._places = [(row_index(part.rows, device), forms[part.slot].bottlenecks[path]) for part in own]
        self._products = products
        self._up_biases = vectors_by_row(own, lambda slot: forms[slot].bottlenecks[path].up_bias, device)
        self._activation = _activation(self._places, num_rows, device)
        self._reads = {bottleneck.reads for _, bottleneck in self._places}
        self._norms_in = [place for place in self._places if place[1].norm_in_weight is not None]
        self._norms_out = [place for place in self._places if place[1].norm_out_weight is not None]
        self._residuals = [place for place in self._places if place[1].residual]
        self._residual: torch.Tensor | None = None

    def keep_residual(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._residual = args[0]

    def after(self, _module: nn.Module, args: Any, output: Any) -> Any:
        assert self._residual is not None, "the norm before a block is called before the block"
        h = output[0] if isinstance(output, tuple) else output
        width = h.shape[-1]
        y = self._with_bottlenecks(h.reshape(-1, width), self._residual.reshape(-1, width)).view_as(h)
        self._residual = None
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _with_bottlenecks(self, h: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        u = self._inputs(h, r)
        a = torch.zeros_like(h, dtype=torch.promote_types(h.dtype, self._dtype))
        self._products(torch.cat([u, u.new_ones(len(u), 1)], 1), a, self._activation)
        for bias in self._up_biases:
            add(a, bias)
        y = h + a  # rows without a bottleneck add zero
        for rows, bottleneck in self._norms_out:
            if bottleneck.norm_out_of == "a":
                y[rows] = h[rows] + _normed_out(a[rows], bottleneck)
            else:
                y[rows] = _normed_out(y[rows], bottleneck)
        for rows, bottleneck in self._residuals:
            y[rows] += bottleneck.residual * r[rows]
        return y.to(h.dtype)

    def _inputs(self, h: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """What the adapters read; rows of none of them are never looked at."""
        if len(self._reads) == 1 and not self._norms_in:
            return _read(next(iter(self._reads)), h, r)
        u = torch.empty_like(h)
        for rows, bottleneck in self._places:
            u[rows] = _read(bottleneck.reads, h[rows], r[rows])
        for rows, bottleneck in self._norms_in:
            parameters = (bottleneck.norm_in_weight, bottleneck.norm_in_bias, bottleneck.norm_in_epsilon)
            u[rows] = _norm(u[rows], *parameters).to(u.dtype)
        return u


def _read(what: str, h: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    if what == "h + r":
        return h + r
    return h if what == "h" else r


def _normed_out(x: torch.Tensor, bottleneck: Bottleneck) -> torch.Tensor:
    return _norm(x, bottleneck.norm_out_weight, bottleneck.norm_out_bias, bottleneck.norm_out_epsilon)


def _norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """Layer norm; RMS norm where there is no bias. In float32 or wider."""
    assert weight is not None
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is None:
        return functional.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype), epsilon)
    return functional.layer_norm(wide, (x.shape[-1],), weight.to(wide.dtype), bias.to(wide.dtype), epsilon)


def _activation(
    places: Sequence[tuple[slice | torch.Tensor, Bottleneck]], num_rows: int, device: torch.device
) -> Between:
    names = sorted({bottleneck.activation for _, bottleneck in places})
    if len(names) == 1:
        return lambda hidden, rows: _activated(hidden, names[0])
    which = torch.zeros(num_rows, dtype=torch.int64, device=device)
    for rows, bottleneck in places:
        which[rows] = names.index(bottleneck.activation)

    def each(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        own = which[rows]
        for index, name in enumerate(names):
            hidden = torch.where((own == index)[:, None], _activated(hidden, name), hidden)
        return hidden

    return each


def _activated(hidden: torch.Tensor, name: Activation) -> torch.Tensor:
    """hidden: [n, ranks]. Padded to whole vectors: torch computes what is left over by other, scalar, formulas."""
    return ACTIVATIONS[name](padded_rows(hidden))[: len(hidden)]
