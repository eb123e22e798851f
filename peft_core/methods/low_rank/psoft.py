"""PSOFT: the first singular directions of a weight, turned among each other by a small trained matrix.

    base_model.model.<path>.psoft_R.weight     [r (r - 1) / 2]   above the diagonal of a skew matrix Q
                                               [r, r]            the matrix itself, with psoft_orth=False
    base_model.model.<path>.psoft_R.vector_a   [r]               gains before, with psoft_mag_a
    base_model.model.<path>.psoft_R.vector_b   [r]               gains after, with psoft_mag_b

    Semantics, U S V^T the first r singular values and vectors of the base's weight W:
        W' = W + U S (diag(b) R diag(a) - 1) V^T                         ab_svd_init "psoft_init"
        W' = W + U sqrt(S) (diag(b) R diag(a) - 1) sqrt(S) V^T           ab_svd_init "pissa_init"
        R  = (1 + Q) (1 - Q)^-1, or the first `num_cayley_neumann_terms` terms of its series in Q

psoft_alpha cancels. The base's weight is needed: the singular vectors
are not stored. Their signs, which are no property of the weight, matter too; here as in PEFT they are those that the
machine's linear algebra happens to give.

Running example: r = 32
    LinearDelta(down=(R' - 1) V^T [32, in], up=U S [out, 32])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from peft_core.errors import MalformedAdapter, shown
from peft_core.forms import LinearDelta
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.low_rank.decompositions import decomposition_warnings
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.checks import whole_number
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "PSOFT"
MATRIX, BEFORE, AFTER = "psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"
_DEFAULT_RANK, _DEFAULT_TERMS, _DEFAULT_STEPS = 32, 5, 10
_MAX_TERMS, _MAX_STEPS = 64, 100
_SIGNS = (
    "PSOFT stores no singular vectors. Their signs are taken from this machine's linear algebra, as in PEFT; "
    "compare an answer with the training program's."
)


class _Turn(NamedTuple):
    """How the small matrix is made."""

    is_orthogonal: bool
    num_terms: int | None  # of the series; None: the exact matrix
    largest_norm: float | None  # that Q is scaled down to, of the series only

    def matrix(self, values: torch.Tensor, size: int) -> torch.Tensor:
        if not self.is_orthogonal:
            return values
        rows, columns = torch.triu_indices(size, size, 1)
        upper = torch.zeros(size, size)
        upper[rows, columns] = values
        skew = upper - upper.T
        one = torch.eye(size)
        if self.num_terms is None:
            exact: torch.Tensor = torch.linalg.solve(one - skew, one + skew, left=False)
            return exact
        return self._series(skew, one)

    def _series(self, skew: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        """1 + 2 Q + 2 Q^2 + ... + Q^last, as PEFT ends it: three terms reach as far as four."""
        assert self.num_terms is not None
        norm = float(torch.linalg.norm(skew))
        if self.largest_norm is not None and norm > self.largest_norm:
            skew = skew * (self.largest_norm / (norm + 1e-12))
        last = max(3, self.num_terms - 1) if self.num_terms > 2 else self.num_terms - 1
        total, power = one.clone(), one
        for exponent in range(1, last + 1):
            power = power @ skew
            total += power if exponent == last and exponent > 2 else 2 * power
        return total


class _Decomposition(NamedTuple):
    """How the singular values and vectors of a weight are found."""

    is_full: bool
    num_steps: int  # of the randomised method
    seed: int  # of the randomised method
    is_even: bool  # the singular values are shared evenly by both sides

    def first(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The two sides of the first singular directions, whose product they are.  # [out, r], [r, in]"""
        u, s, v = self._values(weight, rank)
        if self.is_even:
            return u * s.sqrt(), s.sqrt()[:, None] * v
        return u * s, v

    def _values(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.is_full:
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            return u[:, :rank], s[:rank], v[:rank]
        with torch.random.fork_rng(devices=[]):  # the method takes no generator
            torch.manual_seed(self.seed)
            u, s, v = torch.svd_lowrank(weight, q=rank, niter=self.num_steps)
        return u, s, v.T


def plan_psoft(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a PSOFT adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger)
    rank = ledger.use_count("r") or _DEFAULT_RANK
    turn, decomposition = _read_turn(ledger), _read_decomposition(ledger)
    suffixes = [MATRIX]
    suffixes += [BEFORE] if ledger.use_flag("psoft_mag_a", default=True) else []
    suffixes += [AFTER] if ledger.use_flag("psoft_mag_b", default=True) else []
    starts_random = not ledger.use_flag("init_weights", True)
    _read_alpha(ledger)
    ledger.set_aside({"psoft_dropout": "dropout is off at inference"})
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=suffixes)

    def match(site: Site, names: Names) -> MatchedSite:
        require_all(names, site.path, suffixes)
        shape_of(header, names[MATRIX], site, (rank * (rank - 1) // 2,) if turn.is_orthogonal else (rank, rank))
        for suffix in suffixes[1:]:
            shape_of(header, names[suffix], site, (rank,))
        if rank > min(site.in_features, site.out_features):
            raise MalformedAdapter(
                f'field "r" = {rank}, but "{site.path}" has {site.in_features} inputs and {site.out_features} outputs. '
                "Use the base that the adapter was trained on.",
                field="r",
                value=rank,
            )
        return MatchedSite(site.path, rank, 1.0)

    def formula(data: SiteData) -> LinearDelta:
        matrix = turn.matrix(data.own[MATRIX], rank)
        matrix = matrix * data.own[AFTER][:, None] if AFTER in data.own else matrix
        matrix = matrix * data.own[BEFORE] if BEFORE in data.own else matrix
        up, right = decomposition.first(data.weight(), rank)
        return LinearDelta(down=(matrix - torch.eye(rank)) @ right, up=up)

    warnings = (_SIGNS, *(decomposition_warnings(KIND, file.modules, spec) if decomposition.is_full else ()))
    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random, warnings)
    return draft.plan(match, formula, needs_base=True)


def _read_turn(ledger: ConfigLedger) -> _Turn:
    is_orthogonal = ledger.use_flag("psoft_orth", default=True)
    is_series = ledger.use_flag("use_cayley_neumann")
    num_terms = ledger.use_count("num_cayley_neumann_terms") or _DEFAULT_TERMS
    if num_terms > _MAX_TERMS:
        refuse("num_cayley_neumann_terms", num_terms, f"at most {_MAX_TERMS} are computed. Train with fewer.")
    largest = ledger.use_number("cayley_neumann_eps", 0.0)
    return _Turn(is_orthogonal, num_terms if is_series else None, largest or None)


def _read_decomposition(ledger: ConfigLedger) -> _Decomposition:
    method = ledger.use("psoft_svd", "full")
    if method not in ("full", "lowrank"):
        refuse("psoft_svd", method, 'known here: "full" and "lowrank". Train with one of them.')
    start = ledger.use("ab_svd_init", "psoft_init")
    if start not in ("psoft_init", "pissa_init"):
        refuse("ab_svd_init", start, 'known here: "psoft_init" and "pissa_init". Train with one of them.')
    return _Decomposition(
        is_full=method == "full",
        num_steps=whole_number(ledger, "psoft_svd_lowrank_niter", _DEFAULT_STEPS, _MAX_STEPS + 1),
        seed=whole_number(ledger, "random_seed", 0),
        is_even=start == "pissa_init",
    )


def _read_alpha(ledger: ConfigLedger) -> None:
    alpha = ledger.use_number("psoft_alpha", 32)
    if alpha <= 0:
        raise MalformedAdapter(
            f'field "psoft_alpha" = {shown(alpha)}; expected a number above 0, which then cancels. '
            "Correct adapter_config.json.",
            field="psoft_alpha",
            value=alpha,
        )
