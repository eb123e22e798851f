"""Refusals that many kinds share."""

from __future__ import annotations

from collections.abc import Mapping

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter, shown
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.site_tensors import Side
from peft_core.spec import Site


def refuse_conv1d(site: Site, names: Mapping[str, str], kind: str) -> None:
    """Raises UnsupportedAdapter at a `transformers.Conv1D`, for a kind that PEFT makes on linear modules only."""
    if not site.transposed:
        return
    name = next(iter(names.values()))
    raise UnsupportedAdapter(
        f'tensor "{name}" adapts "{site.path}", which is a Conv1D in this base: {kind} is defined on linear modules '
        "only. Use the base that the adapter was trained on.",
        tensor=name,
    )


def refuse_embeddings(header: Header, part: str, kind: str) -> None:
    """Raises UnsupportedAdapter for a tensor that changes an embedding, for a kind that is served on linears only.

    Args:
        part: how PEFT names such a tensor, without what follows: "oft_embedding_R".
    """
    for name in header:
        if f".{part}" in name:
            raise UnsupportedAdapter(
                f'tensor "{name}" changes an embedding, on which {kind} is not served. '
                "Train without the embedding in target_modules.",
                tensor=name,
            )


def contradiction(name: str, says: str, field: str, value: object) -> MalformedAdapter:
    """The error for a tensor and a field that disagree.

    Args:
        says: follows the tensor's name: "scales inputs".
    """
    return MalformedAdapter(
        f'tensor "{name}" {says}, but field "{field}" = {shown(value)} says otherwise. '
        "Config and tensors are not of one adapter; save it again.",
        field=field,
        value=value,
        tensor=name,
    )


def require_whole_blocks(site: Site, name: str, size: int, *sides: Side) -> None:
    """Raises BaseMismatch where a side of the module cannot be split into blocks of a size."""
    for side in sides:
        features = site.in_features if side == "in" else site.out_features
        if features % size:
            raise BaseMismatch(
                f'tensor "{name}" has blocks of {size}; the {features} {side}puts of "{site.path}" in this base are no '
                "multiple of that. Use the base that the adapter was trained on.",
                tensor=name,
            )
