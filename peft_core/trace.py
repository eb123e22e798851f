"""What the base model does with its linear modules, found by watching one small forward pass.

The model is a black box, so nothing is assumed from names: siblings that were handed the very
same tensor, one after another, may be computed as one product; a linear that was not called
exactly once with all rows of the step (a router's expert, a branch not taken) cannot take
adapters, because its rows are not the step's rows; nor can one that returns anything but its product
(some routers are subclasses of linear layers).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from peft_core.kernels.base_product import can_stack
from peft_core.spec import BaseModelSpec

NUM_TRACED_TOKENS = 24  # so many that no expert gets all of them by chance


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
    calls = _Calls()
    widths = {path: spec.sites[path].out_features for path in linear}
    with _watched(modules, widths, calls), torch.inference_mode():
        tokens = torch.arange(NUM_TRACED_TOKENS, device=model.device)[None] % spec.vocab_size
        model(input_ids=tokens, use_cache=False)
    unreachable = calls.odd | {path for path in linear if not _sees_every_row(calls.inputs(path))}
    return replace(
        spec,
        sites={path: site for path, site in spec.sites.items() if path not in unreachable},
        other_modules=(*spec.other_modules, *sorted(unreachable)),
        input_groups=tuple(_groups(calls, unreachable, modules)),
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
