"""Replace the linear modules of a base model by ours; what adapters do elsewhere needs hooks, while a step lasts."""

from __future__ import annotations

from typing import Any

from peft_core.hooks.step_hooks import StepHooks
from peft_core.kernels.base_product import base_product
from peft_core.layers import ActiveBatch, AdaptedLinear, GroupProduct
from peft_core.spec import BaseModelSpec


def attach(model: Any, spec: BaseModelSpec, active: ActiveBatch) -> None:
    """Put an `AdaptedLinear` at every linear site; weights are repacked and the originals dropped.

    `spec` is the traced spec of this very model.
    """
    groups = active.residency.groups
    for group in groups:
        if group.is_block:
            continue  # nothing stands there until a step needs it, see `peft_core.hooks`
        modules = [model.get_submodule(path) for path in group.paths]
        product = GroupProduct(group, base_product(modules), active)
        for index, path in enumerate(group.paths):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, AdaptedLinear(product, index))
    active.hooks = StepHooks(model, spec, active.residency)
