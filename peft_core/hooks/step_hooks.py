"""Forms that are not at linear sites act by hooks on the base's own modules, and only while a step needs them.

A step whose adapters are all low-rank has no hook anywhere. Which hooks a step needs depends on who is in the batch, so
they stay until that changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch.utils.hooks import RemovableHandle

from peft_core.batch import SlotRows
from peft_core.forms import AdapterForms
from peft_core.hooks.blocks import BlockHooks
from peft_core.hooks.embeddings import EmbeddingHooks
from peft_core.hooks.experts import experts_hook, router_hook
from peft_core.hooks.norms import norm_hook
from peft_core.residency import Residency
from peft_core.sites import SiteGroup
from peft_core.spec import BaseModelSpec


class StepHooks:
    """The hooks of the current step on one base model."""

    def __init__(self, model: Any, spec: BaseModelSpec, residency: Residency) -> None:
        self._modules = dict(model.named_modules())
        self._spec, self._residency = spec, residency
        tokens = model.get_input_embeddings()
        self._input_path = next(path for path, module in self._modules.items() if module is tokens)
        self._groups: dict[str, SiteGroup] = {group.leader: group for group in residency.groups if group.is_block}
        self._handles: list[RemovableHandle] = []

    @property
    def num_installed(self) -> int:
        return len(self._handles)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def install(self, parts: Sequence[SlotRows], num_rows: int, add_products: Any, *, has_virtual: bool) -> None:
        """Replace the hooks by those that `parts` need.

        Args:
            has_virtual: there are virtual tokens in the step; a decoding row of their adapter needs no hook for them.
            add_products: (group, u, y, between) -> None, the low-rank products of the step in progress.
        """
        self.remove()
        forms = {part.slot: self._residency.parts(part.slot) for part in parts}
        for path in _paths(forms, "norms"):
            module, row_dim = self._modules[path], self._spec.norms[path].row_dim
            self._handles.append(module.register_forward_hook(norm_hook(module, path, row_dim, parts, forms)))
        self._install_embeddings(parts, forms, has_virtual=has_virtual)
        self._install_experts(parts, forms)
        for path in _paths(forms, "bottlenecks"):
            products = partial(add_products, self._groups[path])
            hooks = BlockHooks(path, parts, forms, products, num_rows, self._residency.elements)
            norm = self._modules[self._spec.blocks[path].norm]
            self._handles.append(norm.register_forward_pre_hook(hooks.keep_residual))
            self._handles.append(self._modules[path].register_forward_hook(hooks.after))

    def _install_experts(self, parts: Sequence[SlotRows], forms: Mapping[int, AdapterForms]) -> None:
        """At every block that an adapter changes: the experts, if it changes them, and the router."""
        changed = {name.rpartition(".")[0] for name in _paths(forms, "experts")}
        blocks = {path.rpartition(".")[0] for path in changed}
        for name, shape in self._spec.expert_parameters.items():
            path = name.rpartition(".")[0]
            is_router = len(shape) == 2
            if path.rpartition(".")[0] not in blocks or not (is_router or path in changed):
                continue
            changed.discard(path)  # experts have several parameters
            hook = (router_hook if is_router else experts_hook)(self._modules[path], path, parts, forms)
            self._handles.append(self._modules[path].register_forward_hook(hook, with_kwargs=True))

    def _install_embeddings(
        self, parts: Sequence[SlotRows], forms: Mapping[int, AdapterForms], *, has_virtual: bool
    ) -> None:
        paths = set(_paths(forms, "embeddings"))
        if has_virtual or any(one.vocab_size for one in forms.values()):
            paths.add(self._input_path)
        for path in sorted(paths):
            module = self._modules[path]
            embeds_virtual = has_virtual and path == self._input_path
            hooks = EmbeddingHooks(module, path, parts, forms, has_virtual=embeds_virtual)
            self._handles.append(module.register_forward_pre_hook(hooks.before))
            self._handles.append(module.register_forward_hook(hooks.after))


def _paths(forms: Mapping[int, AdapterForms], name: str) -> list[str]:
    return sorted({path for one in forms.values() for path in getattr(one, name)})
