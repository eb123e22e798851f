"""What the engine must know of an adapter before its image is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who only carries traits needs no torch
    from peft_core.forms import AdapterForms

VIRTUAL_TOKEN_BASE = 1 << 30  # virtual token i of task t has the id VIRTUAL_TOKEN_BASE + t * num_virtual_tokens + i


@dataclass(frozen=True, slots=True)
class AdapterTraits:
    """Plain data; travels with the version's record and the engine's ticket. The defaults are those of LoRA."""

    num_virtual_tokens: int = 0  # tokens before the prompt
    first_position: int = 0  # of the first real token
    num_tasks: int = 0  # the request names one of so many tasks; 0: it must name none
    has_prefix: bool = False  # the virtual tokens' K/V come from the image
    invocation_tokens: tuple[int, ...] = ()  # see `AdapterForms`
    vocab_size: int | None = None  # see `AdapterForms`

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "invocation_tokens": list(self.invocation_tokens)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdapterTraits:
        """Raises TypeError where the data is not what `to_json` writes."""
        return cls(**{**data, "invocation_tokens": tuple(data.get("invocation_tokens", ()))})


PLAIN_TRAITS = AdapterTraits()


def traits_of(forms: AdapterForms) -> AdapterTraits:
    prefix, virtual = forms.prefix, forms.virtual
    assert prefix is None or virtual is None, "an adapter brings rows or keys and values, not both"
    num_tokens = prefix.num_tokens if prefix is not None else virtual.num_tokens if virtual is not None else 0
    return AdapterTraits(
        num_virtual_tokens=num_tokens,
        first_position=prefix.first_position if prefix is not None else num_tokens,
        num_tasks=virtual.rows.shape[0] if virtual is not None and virtual.has_tasks else 0,
        has_prefix=prefix is not None,
        invocation_tokens=forms.invocation_tokens,
        vocab_size=forms.vocab_size,
    )
