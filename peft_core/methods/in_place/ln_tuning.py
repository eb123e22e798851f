"""Trained layer norms (https://arxiv.org/abs/2312.11420): the parameters of some norms, replaced.

    base_model.model.<path>.ln_tuning_layers.weight, and .ln_tuning_layers.bias where the norm has one     [width]

The values are the norm's own, in its own convention. Nothing else is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.forms import AdapterForms, NormWeights
from peft_core.methods.base_weights import BaseWeights
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.report import DecodeReport, MatchedSite
from peft_core.methods.tensors import FLOAT_DTYPES, Header, TensorSource, read_finite
from peft_core.methods.tuner.config import TunerConfig, read_tuner_config, some
from peft_core.methods.tuner.file import TunerFile, require_all, sort_tuner_file
from peft_core.methods.tuner.merging import merged
from peft_core.methods.tuner.plan import Names
from peft_core.methods.tuner.saved_plan import SavedPlan
from peft_core.spec import BaseModelSpec

KIND = "LN_TUNING"
_WEIGHT, _BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


@dataclass(frozen=True, slots=True)
class NormPlan:
    """All decisions about one adapter, made without reading a tensor."""

    report: DecodeReport
    norms: Mapping[str, Names]  # by path
    saved: SavedPlan

    def read(self, tensors: TensorSource, base: BaseWeights | None) -> AdapterForms:
        """Raises MalformedAdapter where a value is NaN or infinite."""
        norms: dict[str, NormWeights] = {}
        for path, names in self.norms.items():
            bias = read_finite(tensors, names[_BIAS]) if _BIAS in names else None
            norms[path] = NormWeights(read_finite(tensors, names[_WEIGHT]), bias)
        return merged(AdapterForms(norms=norms), self.saved.read(tensors, base))


def plan_ln_tuning(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> NormPlan:
    """Decide everything about an adapter of trained norms from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger)
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(_WEIGHT, _BIAS))
    if not file.modules:
        raise MalformedAdapter(
            f"the file has {len(header)} tensors, none of them of a trained norm, so the adapter would do nothing. "
            "Save the adapter again with PEFT's save_pretrained."
        )
    for path, names in file.modules.items():
        _require_norm(path, names, header, spec)
    missing = _compare_targets(tuner, file, spec)
    saved = file.saved.check(tuner, header, spec)
    norms = {path: file.modules[path] for path in spec.norms if path in file.modules}
    other_base = tuner.other_base(spec)
    left = f"The config targets {some(missing)}, for which the file has no tensors: left as in the base."
    report = DecodeReport(
        kind=KIND,
        sites=tuple(MatchedSite(path, 0, 1.0) for path in norms),
        num_parameters=saved.num_parameters + sum(spec.norms[path].width * len(names) for path, names in norms.items()),
        irrelevant_fields=ledger.irrelevant,
        irrelevant_tensors=file.irrelevant,
        warnings=(*([other_base] if other_base else ()), *([left] if missing else ()), *saved.warnings),
        forms=tuple(dict.fromkeys(("norm", *saved.forms))),
        needs_base=saved.needs_base,
    )
    return NormPlan(report, norms, saved)


def _require_norm(path: str, names: Names, header: Header, spec: BaseModelSpec) -> None:
    name = next(iter(names.values()))
    norm = spec.norms.get(path)
    if norm is None and (path in spec.sites or path in spec.other_modules):
        raise UnsupportedAdapter(
            f'tensor "{name}" replaces "{path}", which is no norm. Train it with modules_to_save.', tensor=name
        )
    if norm is None:
        raise BaseMismatch(
            f'tensor "{name}" belongs to "{path}", which this base ({spec.model_type}) does not have. '
            "Use the base that the adapter was trained on.",
            tensor=name,
        )
    require_all(names, path, (_WEIGHT, _BIAS) if norm.has_bias else (_WEIGHT,))
    for name in names.values():
        if header[name].dtype not in FLOAT_DTYPES:
            raise MalformedAdapter(
                f'tensor "{name}" has dtype {header[name].dtype}; expected one of {", ".join(FLOAT_DTYPES)}. '
                "Save the adapter in a floating-point type.",
                tensor=name,
            )
        if tuple(header[name].shape) != (norm.width,):
            raise BaseMismatch(
                f'tensor "{name}" has shape {list(header[name].shape)}; "{path}" of this base needs [{norm.width}]. '
                "Use the base that the adapter was trained on.",
                tensor=name,
            )
    if _BIAS in names and not norm.has_bias:
        raise BaseMismatch(
            f'tensor "{names[_BIAS]}" is the bias of "{path}", which has none in this base. '
            "Use the base that the adapter was trained on.",
            tensor=names[_BIAS],
        )


def _compare_targets(tuner: TunerConfig, file: TunerFile, spec: BaseModelSpec) -> list[str]:
    """Hold the file against the config; returns the norms that are targeted but have no tensors."""
    if tuner.rule is None:
        return []
    extra = [path for path in file.modules if not tuner.rule.matches(path)]
    if extra:
        name = next(iter(file.modules[extra[0]].values()))
        raise UnsupportedAdapter(
            f'tensor "{name}" belongs to a norm that the config does not target ({len(extra)} such norms). '
            "PEFT would drop it in silence. Correct target_modules or exclude_modules, or remove the tensors.",
            tensor=name,
        )
    return [path for path in spec.norms if tuner.rule.matches(path) and path not in file.modules]
