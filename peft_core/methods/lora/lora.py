"""LoRA (https://arxiv.org/abs/2106.09685) and its variants: a low-rank addition to linear modules.

    base_model.model.<path>.lora_A.weight   [rank, in_features]
    base_model.model.<path>.lora_B.weight   [out_features, rank]

    Semantics:
        y += scaling * lora_B (lora_A x),   scaling = alpha / rank  or  alpha / sqrt(rank)

The file decides which modules are adapted and with which rank; the config decides the scaling and the variant, and must
agree with the file. A fused projection (`qkv_proj`, `c_attn`) is one site like any other. Beside the factors a file may
replace parameters of the base (`saved_modules`). Knows nothing of engines: how many adapters, which rows, which device.

Running example: r = 4, lora_alpha = 8 on `model.layers.0.self_attn.q_proj` of a base with hidden size 64
    LinearDelta(down=lora_A [4, 64], up=2.0 * lora_B [64, 4])
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.forms import AdapterForms, EmbeddingChange, LinearDelta, SiteChange
from peft_core.methods.base_weights import BaseWeights
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.lora.config import LoraConfig, read_lora_config
from peft_core.methods.lora.experts import ExpertPlan, plan_experts
from peft_core.methods.lora.forms import read_embedding, read_linear
from peft_core.methods.lora.head import fold_head, refuse_at_head
from peft_core.methods.lora.sites import SUFFIXES, TRAINING_SUFFIXES, LoraSite, match_site
from peft_core.methods.report import DecodeReport, FormName, MatchedSite
from peft_core.methods.targets import targeted_sites
from peft_core.methods.tensors import Header, TensorSource
from peft_core.methods.tuner.config import some
from peft_core.methods.tuner.file import PREFIX, TunerFile, require_site, sort_tuner_file
from peft_core.methods.tuner.merging import merged
from peft_core.methods.tuner.saved_plan import SavedPlan
from peft_core.methods.tuner.vocabulary import Vocabulary
from peft_core.spec import BaseModelSpec

KIND = "LORA"


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """All decisions about one adapter, made without reading a tensor."""

    report: DecodeReport
    config: LoraConfig
    sites: tuple[LoraSite, ...]  # in the base's order
    saved: SavedPlan
    experts: ExpertPlan
    spec: BaseModelSpec

    def read(self, tensors: TensorSource, base: BaseWeights | None) -> AdapterForms:
        """Turn every module's tensors into its form; float32 throughout.

        Raises:
            MalformedAdapter: a tensor holds NaN or infinity, or is not what the header announced.
            UnsupportedAdapter: the base's weights are needed and not at hand.
        """
        seen = self.saved.base_seen(tensors, base)
        linear: dict[str, LinearDelta] = {}
        changes: dict[str, SiteChange] = {}
        embeddings: dict[str, EmbeddingChange] = {}
        for lora in self.sites:
            path = lora.site.path
            if lora.site.kind == "embedding":
                embeddings[path] = read_embedding(lora, tensors, seen)
                continue
            linear[path], change = read_linear(lora, self.config, tensors, seen, keeps_base=path in self.saved.weights)
            if change is not None:
                changes[path] = change
        own = AdapterForms(
            linear=linear,
            changes=changes,
            embeddings=embeddings,
            experts=self.experts.read(tensors),
            invocation_tokens=self.config.invocation_tokens,
        )
        saved = self.saved.read(tensors, base)
        if self.config.invocation_tokens:
            _refuse_replaced(self.config, (*saved.changes, *saved.embeddings))
        return fold_head(merged(own, saved), Vocabulary.of(self.spec).head)


def plan_lora(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> LoraPlan:
    """Decide everything about a LoRA adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    lora = read_lora_config(ledger)
    file = sort_tuner_file(header, spec, suffixes=SUFFIXES, irrelevant=TRAINING_SUFFIXES)
    _require_something(file, header)
    saved = file.saved.check(lora.common, header, spec)
    experts = plan_experts(file.modules, lora, header, spec)
    sites = _match_sites(file, header, lora, saved, experts, spec)
    missing = (*_compare_targets(lora, sites, saved, experts, spec), *experts.missing)
    _refuse_always_active(lora, saved, spec)
    _refuse_lost_base(lora, sites, saved, spec)
    for site in sites:
        refuse_at_head(site, saved)
    factors = sum(math.prod(header[name].shape) for site in sites for name in site.names)
    report = DecodeReport(
        kind=KIND,
        sites=(*(_matched(site, lora, saved) for site in sites), *experts.sites),
        num_parameters=factors + experts.num_parameters + saved.num_parameters,
        irrelevant_fields=ledger.irrelevant,
        irrelevant_tensors=file.irrelevant,
        warnings=tuple(_warnings(lora, sites, missing, saved, experts, spec)),
        forms=_forms(sites, saved, experts),
        needs_base=lora.changes_base or lora.has_magnitudes or saved.needs_base,
    )
    return LoraPlan(report, lora, sites, saved, experts, spec)


def _require_something(file: TunerFile, header: Header) -> None:
    saved = file.saved
    if file.modules or saved.weights or saved.biases or saved.token_rows:
        return
    raise MalformedAdapter(
        f"the file has {len(header)} tensors, none of them a LoRA factor, so the adapter would do nothing. "
        f'Expected names such as "{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight".'
    )


def _match_sites(
    file: TunerFile, header: Header, lora: LoraConfig, saved: SavedPlan, experts: ExpertPlan, spec: BaseModelSpec
) -> tuple[LoraSite, ...]:
    vocabulary = Vocabulary.of(spec)
    found: dict[str, LoraSite] = {}
    for path, tensors in file.modules.items():
        if path in experts.owned:
            continue
        site = require_site(path, next(iter(tensors.values())), spec, kinds=("linear", "head", "embedding"))
        num_rows = vocabulary.size(path) if saved.vocabulary is None else saved.vocabulary
        found[path] = match_site(site, tensors, header, lora, num_rows if vocabulary.size(path) is not None else None)
    return tuple(found[path] for path in spec.sites if path in found)


def _compare_targets(
    lora: LoraConfig, sites: tuple[LoraSite, ...], saved: SavedPlan, experts: ExpertPlan, spec: BaseModelSpec
) -> tuple[str, ...]:
    """Hold the file against the config; returns the modules that are targeted but have no tensors."""
    rule = lora.common.rule
    if rule is None and not lora.parameters:
        return ()
    targeted = experts.linears
    if rule is not None:
        targeted |= targeted_sites(rule, spec, ("linear", "head", "embedding"), experts.owned)
    paths = {lora_site.site.path for lora_site in sites}
    if lora.common.ties_weights:
        vocabulary = Vocabulary.of(spec)
        twins = frozenset(twin for path in targeted if (twin := vocabulary.twin(path)) is not None)
        _require_twins(twins - paths)
        targeted |= twins
    extra = [lora_site for lora_site in sites if lora_site.site.path not in targeted]
    if extra:
        name = extra[0].down
        raise UnsupportedAdapter(
            f'tensor "{name}" belongs to a module that the config does not target ({len(extra)} such modules). '
            "PEFT would drop it in silence. Correct target_modules, exclude_modules, modules_to_save or "
            "layers_to_transform, or remove the tensors.",
            tensor=name,
        )
    missing = tuple(path for path in spec.sites if path in targeted - paths - saved.weights.keys())
    if missing and (lora.start == "random" or lora.has_diagonal):  # a module that PiSSA or OLoRA began is neutral
        refuse(
            "init_lora_weights" if lora.start == "random" else "kasa_config",
            lora.start != "random",
            f"the config targets {some(missing)}, for which the file has no tensors, and an untrained module of this "
            "kind is not as in the base. Save the adapter again with all its tensors.",
        )
    return missing


def _require_twins(lacking: Collection[str]) -> None:
    for path in lacking:
        raise MalformedAdapter(
            f'field "ensure_weight_tying" is on, but the file has no factors for "{path}", whose weight is that of a '
            "targeted module. Save the adapter again with a current PEFT, which stores both.",
            field="ensure_weight_tying",
            value=True,
        )


def _refuse_always_active(lora: LoraConfig, saved: SavedPlan, spec: BaseModelSpec) -> None:
    """An activated LoRA is the base before its invocation; whatever replaces parameters of the base is not."""
    if not lora.invocation_tokens:
        return
    vocabulary = saved.vocabulary or spec.vocab_size
    if any(not 0 <= token < vocabulary for token in lora.invocation_tokens):
        raise BaseMismatch(
            f'field "alora_invocation_tokens" = {list(lora.invocation_tokens)}, but the base has {vocabulary} tokens. '
            "Use the base that the adapter was trained on.",
            field="alora_invocation_tokens",
            value=list(lora.invocation_tokens),
        )
    replaced = [path for path, stored in saved.weights.items() if not stored.is_copy]
    replaced += [*saved.biases, *(row.path for row in saved.rows)]
    replaced += ["the vocabulary"] if saved.vocabulary is not None else []
    _refuse_replaced(lora, replaced)


def _refuse_replaced(lora: LoraConfig, replaced: Collection[str]) -> None:
    if replaced:
        refuse(
            "alora_invocation_tokens",
            list(lora.invocation_tokens),
            f"the file also replaces parameters of {some(replaced)}, which would act before the invocation too. "
            "Train an activated LoRA without modules_to_save, bias and trainable_token_indices.",
        )


def _refuse_lost_base(lora: LoraConfig, sites: tuple[LoraSite, ...], saved: SavedPlan, spec: BaseModelSpec) -> None:
    """What an initialisation takes out of a head it also takes out of an embedding that is the same weight."""
    head = next((s.site.path for s in sites if s.site.kind == "head"), None)
    if head is None or not lora.changes_base or head in saved.weights or not spec.tie_word_embeddings:
        return
    refuse(
        "kasa_config" if lora.has_diagonal else "init_lora_weights",
        True if lora.has_diagonal else lora.start,
        f'it changed the weight of "{head}", which is that of the embedding as well, and the file does not have it. '
        "Save the adapter with save_embedding_layers=True.",
    )


def _matched(lora_site: LoraSite, lora: LoraConfig, saved: SavedPlan) -> MatchedSite:
    is_doubled = lora.changes_base and lora_site.site.kind != "embedding" and lora_site.site.path not in saved.weights
    return MatchedSite(lora_site.site.path, lora_site.rank * (2 if is_doubled else 1), lora_site.scaling)


def _forms(sites: tuple[LoraSite, ...], saved: SavedPlan, experts: ExpertPlan) -> tuple[FormName, ...]:
    own: list[FormName] = ["experts"] if experts.sites else []
    for lora_site in sites:
        own.append("embedding" if lora_site.site.kind == "embedding" else "low rank")
        if lora_site.magnitude is not None and lora_site.site.kind != "embedding":
            own.append("gain")
        if lora_site.bias is not None or (lora_site.magnitude is not None and lora_site.site.has_bias):
            own.append("shift")
    return tuple(dict.fromkeys((*own, *saved.forms)))


def _warnings(
    lora: LoraConfig,
    sites: tuple[LoraSite, ...],
    missing: tuple[str, ...],
    saved: SavedPlan,
    experts: ExpertPlan,
    spec: BaseModelSpec,
) -> Iterable[str]:
    adapted = [*(lora_site.site.path for lora_site in sites), *experts.paths]
    has_targets = lora.common.rule is not None or bool(lora.parameters)
    yield from lora.common.warnings(spec, adapted, missing, has_targets=has_targets)
    yield from saved.warnings
    yield from experts.warnings
