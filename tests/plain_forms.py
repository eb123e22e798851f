"""The forms of one adapter on a plain model, by hooks: the definition of correct, with nothing of the engine in it.

Covers linear sites, changes, embeddings, head rows, norms, blocks. Prefixes, virtual tokens, experts are no hooks:
their tests compare with the library that wrote the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from peft_core.forms import AdapterForms, Bottleneck, EmbeddingChange, HeadRows, LinearDelta, NormWeights, SiteChange
from peft_core.spec import BaseModelSpec

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": functional.leaky_relu,
    "linear": lambda x: x,
}


@contextmanager
def applied(model: Any, forms: AdapterForms, spec: BaseModelSpec) -> Iterator[Any]:
    """Within the block every row of `model` uses the adapter. `spec` is the model's (traced, if there are blocks)."""
    handles: list[Any] = []
    for path in {*forms.linear, *forms.changes, *forms.head_rows} - set(spec.blocks):
        change = forms.changes.get(path, SiteChange())
        hook = _linear_hook(change, forms.linear.get(path), forms.head_rows.get(path))
        handles.append(model.get_submodule(path).register_forward_hook(hook))
    for path, embedding in forms.embeddings.items():
        handles.append(model.get_submodule(path).register_forward_hook(_embedding_hook(embedding)))
    for path, norm in forms.norms.items():
        handles.append(model.get_submodule(path).register_forward_hook(_norm_hook(norm)))
    for path, bottleneck in forms.bottlenecks.items():
        residual: dict[str, torch.Tensor] = {}
        block = spec.blocks[path]
        handles.append(model.get_submodule(block.norm).register_forward_pre_hook(_remember(residual)))
        hook = _block_hook(bottleneck, forms.linear[path], residual)
        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _linear_hook(change: SiteChange, delta: LinearDelta | None, head: HeadRows | None) -> Any:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        if change.input_gain is not None:
            x = x * change.input_gain
        if change.rotation is not None:
            blocks, size, _ = change.rotation.shape
            x = torch.einsum("...bi,bij->...bj", x.unflatten(-1, (blocks, size)), change.rotation).flatten(-2)
        z = output if x is args[0] else _plain(module, x)
        if change.replacement is not None:
            z = functional.linear(x, change.replacement, getattr(module, "bias", None))
        z = z if change.gain is None else change.gain * z
        if change.cos is not None and change.sin is not None:
            z = change.cos * z + change.sin * _turned(z, change.turn_group)
        z = z if change.dense is None else z + x @ change.dense.T
        if change.kron_left is not None and change.kron_right is not None:
            z = z + x @ torch.kron(change.kron_left, change.kron_right).T
        z = z if change.shift is None else z + change.shift
        z = z if delta is None else z + x @ delta.down.T @ delta.up.T
        if head is not None:
            z = z.clone()
            bias = 0 if getattr(module, "bias", None) is None else module.bias[list(head.token_ids)]  # type: ignore[index]
            z[..., list(head.token_ids)] = x @ head.rows.T + bias
        return z

    return hook


def _plain(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = type(module).forward(module, x)
    return result


def _turned(z: torch.Tensor, group: int) -> torch.Tensor:
    first, second = z.unflatten(-1, (-1, group)).chunk(2, dim=-1)
    return torch.cat([-second, first], -1).flatten(-2)


def _embedding_hook(change: EmbeddingChange) -> Any:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        ids = args[0]
        scale = getattr(module, "embed_scale", 1.0)
        table = module.weight if change.replacement is None else change.replacement
        row = functional.embedding(ids, table)  # type: ignore[arg-type]
        if change.rows is not None:
            for index, token in enumerate(change.token_ids):
                row = torch.where((ids == token)[..., None], change.rows[index], row)
        if change.down is not None and change.up is not None:
            row = row + functional.embedding(ids, change.down.T) @ change.up.T
        row = row if change.gain is None else row * change.gain
        return (row * scale).to(output.dtype)

    return hook


def _norm_hook(norm: NormWeights) -> Any:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        given = {"weight": norm.weight, "bias": norm.bias}
        parameters = {name: value for name, value in given.items() if value is not None}
        handle = dict(module._forward_hooks)
        module._forward_hooks.clear()
        try:
            result: torch.Tensor = torch.func.functional_call(module, parameters, args)
        finally:
            module._forward_hooks.update(handle)
        return result

    return hook


def _remember(residual: dict[str, torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        residual["r"] = args[0]

    return hook


def _block_hook(bottleneck: Bottleneck, matrices: LinearDelta, residual: dict[str, torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        r = residual["r"]
        u = {"h": h, "r": r, "h + r": h + r}[bottleneck.reads]
        if bottleneck.norm_in_weight is not None:
            u = norm(u, bottleneck.norm_in_weight, bottleneck.norm_in_bias, bottleneck.norm_in_epsilon)
        u = torch.cat([u, torch.ones_like(u[..., :1])], -1)
        a = ACTIVATIONS[bottleneck.activation](u @ matrices.down.T) @ matrices.up.T
        a = a if bottleneck.up_bias is None else a + bottleneck.up_bias
        if bottleneck.norm_out_weight is None:
            y = h + a
        else:
            parameters = (bottleneck.norm_out_weight, bottleneck.norm_out_bias, bottleneck.norm_out_epsilon)
            y = h + norm(a, *parameters) if bottleneck.norm_out_of == "a" else norm(h + a, *parameters)
        y = y + bottleneck.residual * r
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return hook


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """Layer norm; RMS norm where there is no bias."""
    if bias is not None:
        return functional.layer_norm(x, (x.shape[-1],), weight, bias, epsilon)
    return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)
