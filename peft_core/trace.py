"""What the base model does with its linear modules, found by watching one small forward pass.

The model is a black box, so nothing is assumed from names: siblings that were handed the very
same tensor, one after another, may be computed as one product; a linear that was not called
exactly once with all rows of the step (a router's expert, a branch not taken) cannot take
adapters, because its rows are not the step's rows; nor can one that returns anything but its product
(some routers are subclasses of linear layers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding

from peft_core.kernels.base_product import can_stack
from peft_core.spec import BaseModelSpec, BlockSite

NUM_TRACED_TOKENS = 29  # so many that no expert gets all of them by chance, and a number of heads that no model has


@dataclass(slots=True)
class _Norms:
    """What norms read and wrote; tensors are kept alive, so that an identity is never reused."""

    writers: dict[int, str] = field(default_factory=dict)  # id of an output -> the norm
    kept: list[torch.Tensor] = field(default_factory=list)
    row_dims: dict[str, int] = field(default_factory=dict)  # the dimension of the input that counts rows
    calls: Counter[str] = field(default_factory=Counter)
    blocks: dict[str, BlockSite] = field(default_factory=dict)


@dataclass(slots=True)
class _Calls:
    """Linear calls in order; inputs are kept alive, so that an identity is never reused."""

    order: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    odd: set[str] = field(default_factory=set)  # those that did not return [..., out_features]

    def inputs(self, path: str) -> list[torch.Tensor]:
        return [tensor for called, tensor in self.order if called == path]


def traced_spec(model: Any, spec: BaseModelSpec) -> BaseModelSpec:
    """`spec` with its `input_groups`, and without the linear sites that adapters cannot reach.

    Runs the model once on a few tokens; the model itself is not changed.
    """
    modules = dict(model.named_modules())
    linear = [path for path, site in spec.sites.items() if site.kind in ("linear", "head")]
    calls, norms, embeddings = _Calls(), _Norms(), set[str]()
    widths = {path: spec.sites[path].out_features for path in linear}
    with ExitStack() as watches:
        watches.enter_context(_watched(modules, widths, calls))
        watches.enter_context(_watched_norms(modules, spec, norms))
        watches.enter_context(_watched_embeddings(modules, spec, embeddings))
        watches.enter_context(torch.inference_mode())
        tokens = torch.arange(NUM_TRACED_TOKENS, device=model.device)[None] % spec.vocab_size
        model(input_ids=tokens, use_cache=False)
    unreachable = calls.odd | {path for path in linear if not _sees_every_row(calls.inputs(path))}
    unreachable |= {path for path, site in spec.sites.items() if site.kind == "embedding"} - embeddings
    return replace(
        spec,
        sites={path: site for path, site in spec.sites.items() if path not in unreachable},
        other_modules=(*spec.other_modules, *sorted(unreachable)),
        input_groups=tuple(_groups(calls, unreachable, modules)),
        norms={
            path: norm._replace(row_dim=norms.row_dims[path])
            for path, norm in spec.norms.items()
            if norms.calls[path] == 1 and path in norms.row_dims
        },
        blocks={path: block for path, block in norms.blocks.items() if norms.calls[block.norm] == 1},
    )


@contextmanager
def _watched(modules: dict[str, nn.Module], widths: dict[str, int], calls: _Calls) -> Iterator[None]:
    """`widths`: path of each module to watch -> its out_features."""

    def watch(path: str) -> Any:
        def look(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            calls.order.append((path, args[0]))
            if not isinstance(output, torch.Tensor) or output.shape != (*args[0].shape[:-1], widths[path]):
                calls.odd.add(path)

        return look

    hooks = [modules[path].register_forward_hook(watch(path)) for path in widths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _watched_norms(modules: dict[str, nn.Module], spec: BaseModelSpec, norms: _Norms) -> Iterator[None]:
    def norm_hook(path: str) -> Any:
        def look(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            norms.calls[path] += 1
            norms.kept += [args[0], output]
            norms.writers[id(output)] = path
            shape = args[0].shape
            dims = [dim for dim in range(len(shape) - 1) if shape[dim] == NUM_TRACED_TOKENS]
            if len(dims) == 1 and shape[-1] == spec.norms[path].width:
                norms.row_dims[path] = dims[0]

        return look

    def block_hook(path: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            result = output[0] if isinstance(output, tuple) else output
            norm = norms.writers.get(id(given))
            if given is None or norm is None or norm.rpartition(".")[0] != path.rpartition(".")[0]:
                return
            if isinstance(result, torch.Tensor) and result.shape == given.shape:
                norms.blocks[path] = BlockSite(path, norm, given.shape[-1])

        return look

    containers = [
        path for path, module in modules.items() if path and path not in spec.sites and any(module.children())
    ]
    hooks = [modules[path].register_forward_hook(norm_hook(path)) for path in spec.norms]
    hooks += [modules[path].register_forward_hook(block_hook(path), with_kwargs=True) for path in containers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _watched_embeddings(modules: dict[str, nn.Module], spec: BaseModelSpec, plain: set[str]) -> Iterator[None]:
    """Collects the embeddings that look up one row for each of the ids that they are given."""

    def watch(path: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            ids = args[0] if args else None
            if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.numel() != NUM_TRACED_TOKENS:
                return
            rows = embedding(ids, module.get_parameter("weight")) * getattr(module, "embed_scale", 1.0)
            if output.shape == rows.shape and torch.allclose(output, rows.to(output.dtype)):
                plain.add(path)

        return look

    paths = [path for path, site in spec.sites.items() if site.kind == "embedding"]
    hooks = [modules[path].register_forward_hook(watch(path)) for path in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _sees_every_row(inputs: list[torch.Tensor]) -> bool:
    return len(inputs) == 1 and inputs[0].shape[:-1].numel() == NUM_TRACED_TOKENS


def _groups(calls: _Calls, unreachable: set[str], modules: dict[str, nn.Module]) -> Iterator[tuple[str, ...]]:
    group: list[str] = []
    shared: torch.Tensor | None = None
    for path, tensor in calls.order:
        if path in unreachable or not can_stack(modules[path]):
            continue
        if group and tensor is shared and path.rpartition(".")[0] == group[0].rpartition(".")[0]:
            group.append(path)
            continue
        if len(group) > 1:
            yield tuple(group)
        group, shared = [path], tensor
    if len(group) > 1:
        yield tuple(group)
