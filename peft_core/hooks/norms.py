"""Norms with other parameters: computed again for the rows of the adapters that bring them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import layer_norm, rms_norm

from peft_core.batch import SlotRows
from peft_core.forms import AdapterForms
from peft_core.hooks.bare import without_hooks
from peft_core.kernels.vectors import vectors_by_row


class _Rows(NamedTuple):
    rows: slice | torch.Tensor
    weight: torch.Tensor  # [rows or 1, width]
    bias: torch.Tensor | None


Norm = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor
]  # (x, weight, bias), all [rows, ..., width]


def norm_hook(
    module: nn.Module, path: str, row_dim: int, parts: Sequence[SlotRows], forms: Mapping[int, AdapterForms]
) -> Callable[..., torch.Tensor]:
    """A forward hook for one norm. `row_dim`: the dimension of its input that counts the step's rows."""
    device = module.get_parameter("weight").device
    base = dict(module.named_parameters(recurse=False))

    def parameter(name: str) -> Callable[[int], torch.Tensor | None]:
        def of(slot: int) -> torch.Tensor | None:
            if path not in forms[slot].norms:
                return None
            own = getattr(forms[slot].norms[path], name)
            return base.get(name) if own is None else own

        return of

    weights = vectors_by_row(parts, parameter("weight"), device)
    biases = vectors_by_row(parts, parameter("bias"), device) if "bias" in base else [None] * len(weights)
    changed = [
        _Rows(weight.rows, weight.values, None if bias is None else bias.values)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    norm = _norm_with_rows_of_weights(module)

    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x, result = args[0].movedim(row_dim, 0), output.movedim(row_dim, 0)
        for one in changed:
            inputs = x[one.rows]
            between = [1] * (inputs.dim() - 2)
            weight = one.weight.view(len(one.weight), *between, -1)
            bias = None if one.bias is None else one.bias.view(len(one.bias), *between, -1)
            result[one.rows] = norm(inputs, weight, bias).to(output.dtype)
        return output

    return hook


def _norm_with_rows_of_weights(module: nn.Module) -> Norm:
    if isinstance(module, nn.LayerNorm):
        shape, epsilon = list(module.normalized_shape), module.eps

        def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            normed = layer_norm(x, shape, None, None, epsilon) * weight
            return normed if bias is None else normed + bias

        return layer
    if isinstance(module, nn.RMSNorm):
        shape, root_epsilon = list(module.normalized_shape), module.eps
        return lambda x, weight, bias: rms_norm(x, shape, None, root_epsilon) * weight
    bare = without_hooks(module)

    def own(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        result: torch.Tensor = torch.func.functional_call(bare, parameters, (x,))
        return result

    return own
