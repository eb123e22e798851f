"""Low-rank additions to the weights of a mixture's experts (`peft_core.forms.ExpertDelta`) and of its router.

The base's experts run as they are, over all rows. Rows of adapters that change them are then computed again: sorted by
expert and, within an expert, by adapter, so that a weight of the base is read once for all adapters. Few rows are
padded (`peft_core.kernels.invariance`), so a row has the same bits whoever shares its expert.

The module is one of transformers' experts (`use_experts_implementation`): stacked weights, called with the rows, the
chosen experts of each [rows, k] and their weights [rows, k].

Running example: two adapters on Mixtral, k = 2, rows 0 (adapter a) and 1 (adapter b), both sent to experts 3 and 5
    pairs by expert and adapter: (3, a, row 0) (3, b, row 1) (5, a, row 0) (5, b, row 1)
    expert 3: one product of the base for both rows, a low-rank product for each
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import linear

from peft_core.batch import SlotRows
from peft_core.forms import AdapterForms, ExpertDelta
from peft_core.hooks.bare import without_hooks
from peft_core.kernels.invariance import invariant_product, padded_rows
from peft_core.kernels.vectors import row_index

Hook = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Any], Any]  # registered with `with_kwargs`
Deltas = Mapping[str, ExpertDelta]  # of one adapter at one module, by the parameter's name

_DOWN = "down_proj"


class _Group(NamedTuple):
    """Pairs of one expert and one adapter that follow one another."""

    expert: int
    owner: int  # index of the adapter's rows among the step's parts
    start: int
    end: int


def experts_hook(module: nn.Module, path: str, parts: Sequence[SlotRows], forms: Mapping[int, AdapterForms]) -> Hook:
    """A forward hook for one experts module. `path`: of the module."""
    own = [(part, deltas) for part in parts if (deltas := deltas_at(forms[part.slot], path))]
    adapted = _AdaptedRows(module, own)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: torch.Tensor) -> Any:
        x, chosen, weights = _routed(args, kwargs)
        width = x.shape[-1]
        rows = output.view(-1, width)
        rows[adapted.rows] = adapted(x.reshape(-1, width), chosen, weights).to(output.dtype)
        return output

    return hook


def router_hook(module: nn.Module, path: str, parts: Sequence[SlotRows], forms: Mapping[int, AdapterForms]) -> Hook:
    """A forward hook for one router, whose `weight` is [experts, hidden_size].

    It also routes again, few rows padded, the rows of adapters that change only the experts: so that their bits do not
    depend on the number of rows either.

    Args:
        path: of the module.
    """
    bare = without_hooks(module)
    base = module.get_parameter("weight")
    block = f"{path.rpartition('.')[0]}."
    own = [
        (row_index(part.rows, base.device), _added(base, deltas_at(forms[part.slot], path).get("weight")))
        for part in parts
        if any(name.startswith(block) for name in forms[part.slot].experts)
    ]

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        x = next(iter((*args, *kwargs.values())))
        x = x.reshape(-1, x.shape[-1])
        results = output if isinstance(output, tuple) else (output,)
        for rows, weight in own:
            inputs = x[rows]
            again = torch.func.functional_call(bare, {"weight": weight}, (padded_rows(inputs),))
            for result, new in zip(results, again if isinstance(again, tuple) else (again,), strict=True):
                if isinstance(result, torch.Tensor):
                    result.view(len(x), -1)[rows] = new[: len(inputs)].view(len(inputs), -1)
        return output

    return hook


def deltas_at(forms: AdapterForms, path: str) -> Deltas:
    """What one adapter adds to the parameters of the module at `path`, by their names."""
    places = ((name.rpartition("."), delta) for name, delta in forms.experts.items())
    return {parameter: delta for (module, _, parameter), delta in places if module == path}


class _AdaptedRows:
    """All rows of a step that one experts module computes with additions."""

    def __init__(self, module: Any, own: Sequence[tuple[SlotRows, Deltas]]) -> None:
        self._module = module
        self._first = "gate_up_proj" if module.has_gate else "up_proj"
        self._deltas = [deltas for _, deltas in own]
        self._dtype = next(delta.down.dtype for deltas in self._deltas for delta in deltas.values())
        self._owners = np.repeat(np.arange(len(own)), [len(part.rows) for part, _ in own])
        device = next(module.parameters(recurse=False)).device
        self.rows = torch.from_numpy(np.concatenate([part.rows for part, _ in own])).to(device)  # [n]

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x: [rows of the step, hidden_size], chosen and weights [rows of the step, k] -> [n, hidden_size], wide."""
        num_chosen = chosen.shape[-1]
        chosen = chosen.reshape(-1, num_chosen)[self.rows]
        order, groups = self._groups(chosen.cpu().numpy())
        pairs = torch.from_numpy(order).to(x.device)
        inputs = x[self.rows[pairs // num_chosen]]
        sums = torch.cat([self._expert(inputs, own) for own in _by_expert(groups)]) if groups else inputs[:0]
        own_weights = weights.reshape(-1, num_chosen)[self.rows].reshape(-1)[pairs[: len(sums)], None]
        weighted = sums * own_weights
        terms = weighted.new_zeros(len(pairs), x.shape[-1])
        terms[pairs[: len(sums)]] = weighted
        terms = terms.view(len(self.rows), num_chosen, -1)
        total = terms[:, 0]
        for index in range(1, num_chosen):  # in this order whatever the number of rows
            total = total + terms[:, index]
        return total

    def _groups(self, chosen: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], list[_Group]]:
        """The order of pairs by expert and adapter, and the runs in it; pairs sent to no expert come last."""
        num_owners = len(self._deltas)
        experts = np.minimum(chosen.reshape(-1), self._module.num_experts)
        keys = experts * num_owners + np.repeat(self._owners, chosen.shape[1])
        order = np.argsort(keys, kind="stable")
        values, starts = np.unique(keys[order], return_index=True)
        ends = [*starts[1:].tolist(), len(keys)]
        groups = [
            _Group(key // num_owners, key % num_owners, start, end)
            for key, start, end in zip(values.tolist(), starts.tolist(), ends, strict=True)
        ]
        return order, [group for group in groups if group.expert < self._module.num_experts]

    def _expert(self, inputs: torch.Tensor, groups: Sequence[_Group]) -> torch.Tensor:
        """One expert over the rows of all adapters that sent rows to it: [pairs, hidden_size] -> the same, wide."""
        module, start, end = self._module, groups[0].start, groups[-1].end
        x = padded_rows(inputs[start:end])
        hidden = self._product(self._first, x, x.dtype, groups)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        y = self._product(_DOWN, hidden, x.dtype, groups)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        return y[: end - start]

    def _product(self, name: str, x: torch.Tensor, dtype: torch.dtype, groups: Sequence[_Group]) -> torch.Tensor:
        """x: [padded pairs, in] -> [padded pairs, out], in the wider of the base's and the adapters' dtype."""
        module, expert, first = self._module, groups[0].expert, groups[0].start
        weight = getattr(module, name)[expert]
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        y = linear(x.to(dtype), weight.T if module.is_transposed else weight, bias)
        y = y.to(torch.promote_types(dtype, self._dtype))  # always, so that a row's company decides nothing
        for group in groups:
            delta = self._deltas[group.owner].get(name)
            if delta is None:
                continue
            own, (down, up) = slice(group.start - first, group.end - first), (delta.down[expert], delta.up[expert])
            y[own] += invariant_product(invariant_product(x[own].to(down.dtype), down), up).to(y.dtype)
        return y


def _by_expert(groups: Sequence[_Group]) -> list[list[_Group]]:
    experts: dict[int, list[_Group]] = {}
    for group in groups:
        experts.setdefault(group.expert, []).append(group)
    return list(experts.values())


def _added(base: torch.Tensor, delta: ExpertDelta | None) -> torch.Tensor:
    """The router's weight with an adapter's addition; it is small, so it is made whole."""
    return base if delta is None else (base + delta.up[0] @ delta.down[0]).to(base.dtype)


def _routed(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, chosen experts, their weights; architectures call the last two by different names."""
    x, one, other = (*args, *kwargs.values())[:3]
    return (x, other, one) if one.is_floating_point() else (x, one, other)
