"""Which tensor of a LoRA file is what, told from its name alone.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    |--- prefix ---| |------------- path -----------| |- part -|

Some exporters leave the adapter's name in (`.lora_A.default.weight`); both spellings are read. Every name ends up as
a factor of a site of the base, or as irrelevant, or the adapter is refused naming it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.methods.tensors import Header
from peft_core.spec import BaseModelSpec

PREFIX = "base_model.model."
_FACTOR = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_IRRELEVANT = re.compile(r".*\.(lora_velora_embed|lora_monteclora_sampler)(\..*)?")

# What a tensor that is no factor belongs to; the first that fits the end of its name is told.
_FEATURES: tuple[tuple[str, str], ...] = (
    (r"\.lora_embedding_[AB](\.default)?", "an adapter on an embedding, which is not served yet"),
    (r"\.lora_magnitude_vector(\.default)?(\.weight)?", "DoRA, which is not served yet"),
    (r"\.lora_B(\.default)?\.bias", "a bias on the up projection (lora_bias), which is not served yet"),
    (r"\.lora_diag(\.default)?", "KaSA, which is not served yet"),
    (r"\.trainable_tokens_delta(\.default)?", "replaced embedding rows (trainable tokens), which are not served yet"),
    (
        r"\.base_layer\.weight",
        "a copy of one of the base's weights, not served yet: save the adapter with save_embedding_layers=False",
    ),
    (r"\.bias", "replaced biases of the base, which are not served yet"),
    (r"\.weight", "whole replaced modules (modules_to_save, or a resized vocabulary), which are not served yet"),
)


class Factors(NamedTuple):
    """Names of the two tensors of one module."""

    down: str
    up: str


class LoraTensors(NamedTuple):
    factors: Mapping[str, Factors]  # by path; each is a linear or the head of the base
    irrelevant: tuple[str, ...]


def sort_tensors(header: Header, spec: BaseModelSpec) -> LoraTensors:
    """Give every tensor its meaning.

    Raises:
        MalformedAdapter: not one tensor is a factor, or half of a pair is missing.
        BaseMismatch: a factor belongs to a module that the base lacks.
        UnsupportedAdapter: a tensor is neither a factor nor irrelevant, or adapts something that is no linear.
    """
    sides: dict[str, dict[str, str]] = {}
    irrelevant: list[str] = []
    unknown: list[str] = []
    for name in header:
        factor = _FACTOR.fullmatch(name)
        if factor:
            _add(sides.setdefault(factor["path"], {}), factor["side"], name)
        elif _IRRELEVANT.fullmatch(name):
            irrelevant.append(name)
        else:
            unknown.append(name)
    if unknown:
        _refuse_unknown(unknown, has_factors=bool(sides))
    if not sides:
        raise MalformedAdapter(
            f"the file has {len(header)} tensors, none of them a LoRA factor, so the adapter would do nothing. "
            f'Expected names such as "{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight".'
        )
    for path, names in sides.items():
        _require_linear(path, next(iter(names.values())), spec)
    return LoraTensors({path: _pair(path, names) for path, names in sides.items()}, tuple(irrelevant))


def _add(names: dict[str, str], side: str, name: str) -> None:
    if side in names:
        raise MalformedAdapter(
            f'tensor "{name}" and tensor "{names[side]}" are the same factor under two names. Save the adapter again.',
            tensor=name,
        )
    names[side] = name


def _pair(path: str, names: Mapping[str, str]) -> Factors:
    if len(names) == 2:
        return Factors(down=names["A"], up=names["B"])
    have, lacking = ("A", "B") if "A" in names else ("B", "A")
    raise MalformedAdapter(
        f'tensor "{names[have]}" is there, but lora_{lacking} of "{path}" is missing. '
        "The file is incomplete; save or upload the adapter again.",
        tensor=names[have],
    )


def _require_linear(path: str, name: str, spec: BaseModelSpec) -> None:
    site = spec.sites.get(path)
    if site is not None and site.kind != "embedding":
        return
    if "experts" in path.split("."):
        raise UnsupportedAdapter(
            f'tensor "{name}" adapts expert weights, which is not served yet. Train on the attention modules only.',
            tensor=name,
        )
    if site is not None or path in spec.other_modules:
        raise UnsupportedAdapter(
            f'tensor "{name}" adapts "{path}", which is not a linear module that every token passes: not served. '
            "Train on such linear modules only.",
            tensor=name,
        )
    raise BaseMismatch(
        f'tensor "{name}" belongs to "{path}", which this base ({spec.model_type}) does not have. '
        "Use the base that the adapter was trained on.",
        tensor=name,
    )


def _refuse_unknown(names: list[str], *, has_factors: bool) -> NoReturn:
    name = names[0]
    if not name.startswith("base_model."):
        raise MalformedAdapter(
            f'tensor "{name}" does not begin with "{PREFIX}", so it belongs to no module; PEFT would drop it in '
            "silence and serve the bare base. Save the adapter with PEFT's save_pretrained.",
            tensor=name,
        )
    for ending, feature in _FEATURES:
        if re.search(ending + "$", name):
            raise UnsupportedAdapter(f'tensor "{name}" belongs to {feature}.', tensor=name)
    hint = "" if has_factors else " and no tensor of the file is a LoRA factor"
    raise UnsupportedAdapter(
        f'tensor "{name}" is unknown here{hint}. It may change what the adapter computes; '
        "remove it from the file if it does not.",
        tensor=name,
    )
