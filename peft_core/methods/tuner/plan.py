"""The plan of a tuner file whose kind changes each of its modules by one formula.

A kind says three things: which tensors a module has and how large they are (`match`), what they mean (`formula`), and
whether the formula reads the base's weights. The rest is the same for all of them: every module with tensors must be
targeted by the config, every targeted module should have tensors, values must be finite, and parameters of the base
that are replaced come along.

    plan_loha(config, header, spec)  ->  TunerDraft(...).plan(match, formula)  ->  TunerPlan.read(tensors, base)

A low-rank change that takes more memory than the whole matrix is kept as the matrix, which is limited as any other, see
`peft_core.methods.whole_matrix.dense`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch

from peft_core.errors import MalformedAdapter, UnsupportedAdapter
from peft_core.forms import AdapterForms, EmbeddingChange, LinearDelta, SiteChange
from peft_core.methods.base_weights import BaseWeights, require_base
from peft_core.methods.report import DecodeReport, FormName, MatchedSite
from peft_core.methods.tensors import Header, TensorSource, require_finite
from peft_core.methods.tuner.checks import LINEAR, require_targets, targeted_paths
from peft_core.methods.tuner.config import TunerConfig, some
from peft_core.methods.tuner.file import TunerFile, require_site
from peft_core.methods.tuner.merging import merged
from peft_core.methods.tuner.saved_plan import SavedPlan
from peft_core.methods.tuner.site_tensors import read_tensor
from peft_core.methods.whole_matrix.dense import dense_bytes
from peft_core.spec import BaseModelSpec, Site, SiteKind

_MAX_FACTOR_VALUES = 2**26  # of one module, before they are multiplied ...
_MAX_FACTOR_SHARE = 4  # ... or so many times the values of the whole matrix, whichever is more

Names = Mapping[str, str]  # suffix -> tensor name
Change = LinearDelta | SiteChange | tuple[SiteChange, LinearDelta] | EmbeddingChange
AnyChange = TypeVar("AnyChange", SiteChange, EmbeddingChange)
Match = Callable[[Site, Names], "MatchedSite | None"]  # None: nothing to do here, e.g. pruned to rank 0


@dataclass(frozen=True, slots=True)
class SiteData:
    """What a formula sees of one module."""

    kind: str
    site: Site
    matched: MatchedSite
    own: Mapping[str, torch.Tensor]  # suffix -> values
    shared: Mapping[str, torch.Tensor]  # shared name -> values
    base: BaseWeights | None

    def weight(self) -> torch.Tensor:
        """The base's weight of this module.  # [out_features, in_features] float32"""
        return require_base(self.base, self.kind).weight(self.site.path).to(torch.float32)

    def bias(self) -> torch.Tensor:
        """The base's bias of this module, zeros where it has none.  # [out_features] float32"""
        bias = require_base(self.base, self.kind).bias(self.site.path) if self.site.has_bias else None
        return torch.zeros(self.site.out_features) if bias is None else bias.to(torch.float32)


Formula = Callable[[SiteData], Change]
Prepare = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]  # of the shared values, once


def as_stored(shared: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return shared


@dataclass(frozen=True, slots=True)
class TunerPlan:
    """All decisions about one adapter, made without reading a tensor."""

    report: DecodeReport
    spec: BaseModelSpec
    modules: Mapping[str, Names]  # by path
    shared: Names
    saved: SavedPlan
    formula: Formula
    prepare: Prepare

    def read(self, tensors: TensorSource, base: BaseWeights | None) -> AdapterForms:
        """Read each module's tensors and let the formula make forms of them; float32 throughout.

        Raises:
            MalformedAdapter: a tensor holds NaN or infinity, or is not what the header announced; or the change is
                beyond float32.
        """
        linear: dict[str, LinearDelta] = {}
        changes: dict[str, SiteChange] = {}
        embeddings: dict[str, EmbeddingChange] = {}
        shared = self.prepare({key: read_tensor(tensors, name) for key, name in self.shared.items()})
        for matched in self.report.sites:
            names = self.modules.get(matched.path, {})
            values = {suffix: read_tensor(tensors, name) for suffix, name in names.items()}
            site = self.spec.sites[matched.path]
            name = next(iter((*names.values(), *self.shared.values())))
            change = self._change(SiteData(self.report.kind, site, matched, values, shared, base), name)
            if isinstance(change, tuple):
                changes[matched.path] = _finite_change(change[0], name)
                change = change[1]
            if isinstance(change, SiteChange):
                changes[matched.path] = _finite_change(change, name)
            elif isinstance(change, EmbeddingChange):
                embeddings[matched.path] = _finite_change(change, name)
            elif matched.rank == 0:
                changes[matched.path] = SiteChange(dense=_finite(change.up @ change.down, name))
            else:
                linear[matched.path] = LinearDelta(_finite(change.down, name), _finite(change.up, name))
        own_forms = AdapterForms(linear=linear, changes=changes, embeddings=embeddings)
        return merged(own_forms, self.saved.read(tensors, base))

    def _change(self, data: SiteData, name: str) -> Change:
        try:
            with torch.no_grad():
                return self.formula(data)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise MalformedAdapter(
                f'tensor "{name}" and those beside it hold values that cannot be worked with: {error}. '
                "Training has diverged or the file is damaged; use an earlier checkpoint.",
                tensor=name,
            ) from error


@dataclass(frozen=True, slots=True)
class TunerDraft:
    """A tuner file and its config, sorted; `plan` decides the rest."""

    kind: str
    config: TunerConfig
    file: TunerFile
    header: Header
    spec: BaseModelSpec
    irrelevant_fields: Mapping[str, str]
    starts_random: bool = False  # a targeted module without tensors would be random, not neutral
    warnings: tuple[str, ...] = ()
    module_free: bool = False  # all values are shared: the config alone says which modules are changed
    forms: tuple[FormName, ...] = ("low rank",)  # of sites with a rank
    rankless_forms: tuple[FormName, ...] = ("dense",)  # of sites without
    kinds: tuple[SiteKind, ...] = LINEAR  # of modules that the kind can change

    def plan(
        self, match: Match, formula: Formula, *, prepare: Prepare = as_stored, needs_base: bool = False
    ) -> TunerPlan:
        """Hold every module against the base and the config.

        Args:
            prepare: makes of the stored shared values those that the formula sees.

        Raises:
            UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
        """
        if not self.file.modules and not self.module_free:
            raise MalformedAdapter(
                f"the file has {len(self.header)} tensors, none of them of a module changed by {self.kind}, so the "
                "adapter would do nothing. Save the adapter again with PEFT's save_pretrained."
            )
        for path, names in self.file.modules.items():
            require_site(path, next(iter(names.values())), self.spec, self.kinds)
        missing = self._compare_targets()
        found: list[MatchedSite] = []
        pruned: list[str] = []
        for path in self._paths():
            matched = match(self.spec.sites[path], self.file.modules.get(path, {}))
            if matched is None:
                pruned.append(path)
            else:
                found.append(matched)
        sites = _smallest(found, self.spec)
        saved = self.file.saved.check(self.config, self.header, self.spec)
        report = DecodeReport(
            kind=self.kind,
            sites=sites,
            num_parameters=self._num_parameters() + saved.num_parameters,
            irrelevant_fields=self.irrelevant_fields,
            irrelevant_tensors=self.file.irrelevant,
            warnings=(*self._warnings(sites, missing, pruned), *saved.warnings),
            forms=self._forms(sites, saved),
            needs_base=needs_base or saved.needs_base,
            dense_bytes=dense_bytes(self._dense_sites(sites)),
        )
        return TunerPlan(report, self.spec, self.file.modules, self.file.shared, saved, formula, prepare)

    def _paths(self) -> tuple[str, ...]:
        if self.module_free:
            return require_targets(self.config, self.spec, self.kinds)
        return tuple(path for path in self.spec.sites if path in self.file.modules)

    def _compare_targets(self) -> tuple[str, ...]:
        """Hold the file against the config; returns the modules that are targeted but have no tensors."""
        targeted = targeted_paths(self.config, self.spec, self.kinds)
        if targeted is None or self.module_free:
            return ()
        extra = [path for path in self.file.modules if path not in targeted]
        if extra:
            name = next(iter(self.file.modules[extra[0]].values()))
            raise UnsupportedAdapter(
                f'tensor "{name}" belongs to a module that the config does not target ({len(extra)} such modules). '
                "PEFT would drop it in silence. Correct target_modules, exclude_modules or layers_to_transform, "
                "or remove the tensors.",
                tensor=name,
            )
        missing = tuple(path for path in targeted if path not in self.file.modules)
        if missing and self.starts_random:
            raise UnsupportedAdapter(
                f'field "target_modules" means {some(missing)}, for which the file has no tensors, and untrained '
                f"values of {self.kind} are random. Save the adapter again with all its tensors.",
                field="target_modules",
                value=list(missing[:1]),
            )
        return missing

    def _num_parameters(self) -> int:
        names = [name for tensors in self.file.modules.values() for name in tensors.values()]
        return sum(math.prod(self.header[name].shape) for name in (*names, *self.file.shared.values()))

    def _forms(self, sites: Collection[MatchedSite], saved: SavedPlan) -> tuple[FormName, ...]:
        own: list[FormName] = []
        kinds = {self.spec.sites[site.path].kind for site in sites if site.rank}
        if kinds - {"embedding"}:
            own += self.forms
        if "embedding" in kinds:
            own.append("embedding")
        if any(site.rank == 0 for site in sites):
            own += self.rankless_forms
        return tuple(dict.fromkeys((*own, *saved.forms)))

    def _dense_sites(self, sites: Collection[MatchedSite]) -> list[Site]:
        if not {"dense", "replacement"} & set(self.rankless_forms):
            return []
        return [self.spec.sites[site.path] for site in sites if site.rank == 0]

    def _warnings(
        self, sites: Collection[MatchedSite], missing: Collection[str], pruned: Collection[str]
    ) -> tuple[str, ...]:
        adapted, has_targets = [site.path for site in sites], self.config.rule is not None
        told = [*self.warnings, *self.config.warnings(self.spec, adapted, missing, has_targets=has_targets)]
        if pruned:
            told.append(f"Pruned to nothing and left as in the base: {some(pruned)}.")
        dense = self._dense_sites(sites)
        if dense:
            paths = some([site.path for site in dense])
            told.append(
                f"As large as whole matrices, and kept as such ({dense_bytes(dense)} bytes in float32): {paths}. "
                "Each of them costs as much memory and time as the base's own."
            )
        return tuple(told)


def served_rank(site: Site, rank: int) -> int:
    """The rank, or 0 where the whole matrix is smaller than factors of this rank."""
    if site.kind == "embedding":
        return rank
    return 0 if rank * (site.in_features + site.out_features) > site.in_features * site.out_features else rank


def _smallest(found: Collection[MatchedSite], spec: BaseModelSpec) -> tuple[MatchedSite, ...]:
    """Rank 0, which is dense, where the whole matrix is smaller than its factors.

    Raises:
        UnsupportedAdapter: the factors are so much larger that they could not even be multiplied here.
    """
    for matched in found:
        site = spec.sites[matched.path]
        size = matched.rank * (site.in_features + site.out_features)
        if size > max(_MAX_FACTOR_VALUES, _MAX_FACTOR_SHARE * site.in_features * site.out_features):
            raise UnsupportedAdapter(
                f'a rank of {matched.rank} on "{matched.path}", which has {site.in_features} inputs and '
                f"{site.out_features} outputs, is not served: the factors would be much larger than the whole matrix. "
                "Train with a smaller rank.",
                field="r",
                value=matched.rank,
            )
    return tuple(replace(matched, rank=served_rank(spec.sites[matched.path], matched.rank)) for matched in found)


def _finite(values: torch.Tensor, name: str) -> torch.Tensor:
    require_finite(values, name)
    return values.to(torch.float32).contiguous()


def _finite_change(change: AnyChange, name: str) -> AnyChange:
    for part in fields(change):
        if isinstance(value := getattr(change, part.name), torch.Tensor):
            require_finite(value, name)
    return change
