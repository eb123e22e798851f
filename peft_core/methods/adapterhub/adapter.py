"""Adapters of AdapterHub's `adapters` library (https://adapterhub.ml), version 1.3 and earlier.

    adapter_config.json       the method, the adapter's name, the base     `container`
    adapter.safetensors       tensors, the adapter's name in their names   `tensors`
    model_head.safetensors    the base's head, trained or not              `head`

The container shares the file name of PEFT's config, and nothing else. One adapter may unite several methods: a prefix
and bottlenecks, say. Each is planned by itself and takes its tensors; what nobody takes is refused by name.

    architecture null         bottlenecks             `bottleneck`
    "lora"                    LoRA, DoRA, VeRA, IA3   `lora`
    "prefix_tuning"           keys and values         `prefix`
    "union"                   several of these
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_core.errors import MalformedAdapter
from peft_core.forms import AdapterForms
from peft_core.methods.adapterhub.bottleneck import plan_bottlenecks
from peft_core.methods.adapterhub.container import Container, Part, read_container
from peft_core.methods.adapterhub.head import plan_head
from peft_core.methods.adapterhub.layout import LAYOUTS
from peft_core.methods.adapterhub.lora import plan_linears
from peft_core.methods.adapterhub.part import PartPlan, Reader
from peft_core.methods.adapterhub.prefix import plan_prefix
from peft_core.methods.adapterhub.tensors import HubTensors
from peft_core.methods.base_weights import BaseWeights
from peft_core.methods.kinds import ADAPTERHUB
from peft_core.methods.ledger import refuse
from peft_core.methods.report import DecodeReport
from peft_core.methods.tensors import Header, TensorSource
from peft_core.methods.tuner.merging import merged
from peft_core.spec import BaseModelSpec

KIND = ADAPTERHUB


@dataclass(frozen=True, slots=True)
class HubPlan:
    """All decisions about one adapter, made without reading a tensor."""

    report: DecodeReport
    parts: tuple[PartPlan, ...]

    def read(self, tensors: TensorSource, base: BaseWeights | None) -> AdapterForms:
        """Read every part; float32 throughout.

        Raises:
            MalformedAdapter: a tensor holds NaN or infinity, or copies of one tensor differ.
            UnsupportedAdapter: the base's weights are needed and not at hand, or a tied head was trained.
        """
        forms = AdapterForms()
        for part in self.parts:
            forms = merged(forms, part.read(Reader(tensors, base)))
        return forms


def plan_adapterhub(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> HubPlan:
    """Decide everything about an adapter of AdapterHub.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    container = read_container(config, spec)
    tensors = HubTensors(header, container.name, spec)
    parts = [_plan_part(part, tensors, spec) for part in container.parts]
    head = plan_head(tensors, spec)
    tensors.close()
    if head is not None:
        parts.append(head)
    return HubPlan(_report(container, parts, spec), tuple(parts))


def _plan_part(part: Part, tensors: HubTensors, spec: BaseModelSpec) -> PartPlan:
    layout = LAYOUTS.get(spec.model_type)
    if part.architecture == "lora":
        return plan_linears(part.ledger, tensors, layout, spec)
    if part.architecture == "prefix_tuning":
        return plan_prefix(part.ledger, tensors, layout, spec)
    if layout is None:
        refuse(
            "architecture",
            None,
            f"where a bottleneck stands in {spec.model_type} is not known here. "
            f"Served with bottlenecks: {', '.join(LAYOUTS)}.",
        )
    return plan_bottlenecks(part.ledger, tensors, layout, spec)


def _report(container: Container, parts: list[PartPlan], spec: BaseModelSpec) -> DecodeReport:
    sites = {site.path: site for part in parts for site in part.sites}
    if len(sites) < sum(len(part.sites) for part in parts):
        raise MalformedAdapter(
            'field "configs": two of the united methods stand at the same place, which the library refuses, too.',
            field="configs",
        )
    places = {path: number for number, path in enumerate((*spec.sites, *spec.blocks))}
    irrelevant = dict(container.irrelevant)
    for part in container.parts:
        irrelevant |= {f"{part.where}.{field}": reason for field, reason in part.ledger.irrelevant.items()}
    return DecodeReport(
        kind=KIND,
        sites=tuple(sorted(sites.values(), key=lambda site: places[site.path])),
        num_parameters=sum(part.num_parameters for part in parts),
        irrelevant_fields=irrelevant,
        irrelevant_tensors=tuple(name for part in parts for name in part.copies),
        warnings=(*container.warnings, *(sentence for part in parts for sentence in part.warnings)),
        forms=tuple(dict.fromkeys(form for part in parts for form in part.forms)),
        needs_base=any(part.needs_base for part in parts),
    )
