"""Matrices as sums of Kronecker products (PHM: Zhang et al. 2021; Compacter: Mahabadi et al. 2021), expanded.

    H = sum over i of kron(rule[i], factor[i])          [in_features, out_features]
    y = x @ H + b

    rule     [n, n, n], or the products of phm_rule_left [n, n, 1] and phm_rule_right [n, 1, n]
    factor   [n, in/n, out/n], or the products of W_left [n, in/n, rank] and W_right [n, rank, out/n]

Rule and factors are the module's own or shared by all modules of the adapter; shared factors are named after the side
that they are for (`W_down_left`).

Running example: n = 4, rank 1, from 64 to 8
    rule [4, 4, 4], factors [4, 16, 1] x [4, 1, 2]      -> weight [8, 64]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from peft_core.errors import MalformedAdapter
from peft_core.methods.adapterhub.fields import STARTS, flag
from peft_core.methods.ledger import ConfigLedger

Side = Literal["down", "up"]
Shape = tuple[int, ...]


class Hypercomplex(NamedTuple):
    size: int  # n
    rank: int
    shares_rule: bool
    factors_rule: bool
    shares_weight: bool
    factors_weight: bool
    has_bias: bool

    def own(self, num_inputs: int, num_outputs: int) -> dict[str, Shape]:
        """Name -> shape of the tensors that a module has for itself; the bias is `b`.

        Raises:
            MalformedAdapter: a side is no multiple of n.
        """
        names: dict[str, Shape] = {} if self.shares_rule else self._rule()
        names |= {} if self.shares_weight else self._weight("W", num_inputs, num_outputs)
        return names | ({"b": (num_outputs,)} if self.has_bias else {})

    def shared(self, side: Side, num_inputs: int, num_outputs: int) -> dict[str, Shape]:
        """Name -> shape of the tensors that a module shares. Raises as `own`."""
        names = self._rule() if self.shares_rule else {}
        return names | (self._weight(f"W_{side}", num_inputs, num_outputs) if self.shares_weight else {})

    def weight(
        self, side: Side, own: Callable[[str], torch.Tensor], shared: Callable[[str], torch.Tensor]
    ) -> torch.Tensor:
        """The matrix in the orientation of a linear.  # [out_features, in_features]"""
        rule = _product(shared if self.shares_rule else own, "phm_rule", self.factors_rule)
        prefix = f"W_{side}" if self.shares_weight else "W"
        factor = _product(shared if self.shares_weight else own, prefix, self.factors_weight)
        sizes = (rule.shape[1] * factor.shape[1], rule.shape[2] * factor.shape[2])
        return torch.einsum("nij,nkl->ikjl", rule, factor).reshape(sizes).T.contiguous()

    def _rule(self) -> dict[str, Shape]:
        n = self.size
        if self.factors_rule:
            return {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)}
        return {"phm_rule": (n, n, n)}

    def _weight(self, prefix: str, num_inputs: int, num_outputs: int) -> dict[str, Shape]:
        n = self.size
        if num_inputs % n or num_outputs % n:
            raise MalformedAdapter(
                f'field "phm_dim" = {n}: sides of {num_inputs} and {num_outputs} are no multiples of it. '
                "Correct adapter_config.json.",
                field="phm_dim",
                value=n,
            )
        rows, columns = num_inputs // n, num_outputs // n
        if self.factors_weight:
            return {f"{prefix}_left": (n, rows, self.rank), f"{prefix}_right": (n, self.rank, columns)}
        return {prefix: (n, rows, columns)}


def read_hypercomplex(ledger: ConfigLedger) -> Hypercomplex | None:
    """Take the fields of PHM off a bottleneck's config; None where it is switched off."""
    is_on = ledger.use_flag("phm_layer")
    read = Hypercomplex(
        size=ledger.use_count("phm_dim") or 4,
        rank=ledger.use_count("phm_rank") or 1,
        shares_rule=flag(ledger, "shared_phm_rule", default=True),
        factors_rule=flag(ledger, "factorized_phm_rule", default=False),
        shares_weight=flag(ledger, "shared_W_phm", default=False),
        factors_weight=flag(ledger, "factorized_phm_W", default=True),
        has_bias=flag(ledger, "phm_bias", default=True),
    )
    ledger.set_aside(dict.fromkeys(("phm_c_init", "phm_init_range", "hypercomplex_nonlinearity"), STARTS))
    ledger.set_aside({"learn_phm": "only says what was trained"})
    return read if is_on else None


def _product(read: Callable[[str], torch.Tensor], name: str, is_factored: bool) -> torch.Tensor:
    if is_factored:
        return torch.bmm(read(f"{name}_left"), read(f"{name}_right"))
    return read(name)
