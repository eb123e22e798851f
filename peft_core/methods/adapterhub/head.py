"""The head that AdapterHub saves beside an adapter, whether it was trained or not: `model_head.safetensors`.

It is compared with the base's; only one that differs becomes a form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peft_core.errors import UnsupportedAdapter
from peft_core.forms import AdapterForms, SiteChange
from peft_core.methods.adapterhub.part import Reader
from peft_core.methods.adapterhub.tensors import HubTensors, Names, require_shape
from peft_core.methods.base_weights import require_base
from peft_core.methods.report import FormName, MatchedSite
from peft_core.spec import BaseModelSpec, Site

_WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class HeadPlan:
    site: Site
    names: Names
    is_tied: bool
    stored_dtype: torch.dtype
    sites: tuple[MatchedSite, ...] = ()
    forms: tuple[FormName, ...] = ("replacement",)
    needs_base: bool = True
    num_parameters: int = 0  # it is rarely the adapter's own
    copies: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        return (
            f'A head is saved beside the adapter ("{self.names[_WEIGHT]}"): used where it differs from the base\'s.',
        )

    def read(self, reader: Reader) -> AdapterForms:
        base = require_base(reader.base, "A head beside an adapter")
        weight = reader.read(self.names[_WEIGHT])
        theirs = base.weight(self.site.path)
        # A head that was saved in fewer bits than the base has is no other head.
        if torch.equal(weight, theirs) or torch.equal(weight, theirs.to(self.stored_dtype).float()):
            return AdapterForms()
        if self.is_tied:
            raise UnsupportedAdapter(
                f'tensor "{self.names[_WEIGHT]}" differs from the base\'s head, which is tied to the embedding: the '
                "library would change both. Not served; leave the head out if it was not trained.",
                tensor=self.names[_WEIGHT],
            )
        return AdapterForms(changes={self.site.path: SiteChange(replacement=weight)})


def plan_head(tensors: HubTensors, spec: BaseModelSpec) -> HeadPlan | None:
    """The head in the file; None where there is none.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the tensor.
    """
    names = tensors.head
    if not names:
        return None
    for suffix, tensor in names.items():
        if suffix != _WEIGHT:
            raise UnsupportedAdapter(f'tensor "{tensor}" of a head is not served: only its weight is.', tensor=tensor)
    site = next(site for site in spec.sites.values() if site.kind == "head")
    require_shape(tensors.header, names[_WEIGHT], (site.out_features, site.in_features), of_base=True)
    stored = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}
    return HeadPlan(site, names, spec.tie_word_embeddings, stored[tensors.header[names[_WEIGHT]].dtype])
