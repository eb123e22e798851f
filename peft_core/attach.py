"""Replace the linear modules of a base model by ours; nothing else of the model changes."""

from __future__ import annotations

from typing import Any

from peft_core.kernels.base_product import base_product
from peft_core.layers import ActiveBatch, AdaptedLinear, GroupProduct
from peft_core.sites import SiteGroup
from peft_core.spec import BaseModelSpec


def attach(model: Any, spec: BaseModelSpec, groups: tuple[SiteGroup, ...], active: ActiveBatch) -> list[GroupProduct]:
    """Put an `AdaptedLinear` at every site of `groups`; weights are repacked and the originals dropped.

    `spec` is the traced spec of this very model. Returns the products in the order of `groups`.
    """
    products = []
    for group in groups:
        modules = [model.get_submodule(path) for path in group.paths]
        is_head = spec.sites[group.leader].kind == "head"
        product = GroupProduct(group, base_product(modules), active, is_head=is_head)
        for index, path in enumerate(group.paths):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, AdaptedLinear(product, index))
        products.append(product)
    return products
