"""What every tensor of a PEFT tuner file is, told from its name alone; the part that all kinds have in common.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight      a tensor of the kind, at a module
    |--- prefix ---| |------------- path -----------| |- suffix -|
    base_model.vera_A                                                   a tensor of the kind, shared by all modules
    base_model.model.model.norm.weight                                  a parameter of the base that was replaced

Some exporters leave the adapter's name in (`.lora_A.default.weight`, `.hada_w1_a.default`); both spellings are read.
Every tensor is of the kind, replaced, or irrelevant; or the adapter is refused naming it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.saved_modules import SavedModules
from peft_core.spec import BaseModelSpec, Site, SiteKind

PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."
_LEFT_IN = ("default", "modules_to_save")  # parts of names that PEFT takes out and some exporters do not
_TRAINING_ONLY = re.compile(r".*\.(original_module\..+|trainable_tokens_original)")  # the base's own beside a new one


@dataclass(frozen=True, slots=True)
class TunerFile:
    """Names only; nothing was read."""

    modules: Mapping[str, Mapping[str, str]]  # path -> suffix -> tensor name, in the order of the file
    shared: Mapping[str, str]  # shared name -> tensor name
    saved: SavedModules  # parameters of the base that are replaced
    irrelevant: tuple[str, ...]  # tensor names


@dataclass
class _Sorting:
    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    saved: list[tuple[str, str]] = field(default_factory=list)  # name without prefix and "default", tensor name
    irrelevant: list[str] = field(default_factory=list)


def sort_tuner_file(
    header: Header,
    spec: BaseModelSpec,
    *,
    suffixes: Collection[str],
    shared: Collection[str] = (),
    irrelevant: Collection[str] = (),
) -> TunerFile:
    """Give every tensor its meaning. Whether a path is a module that the kind can change is asked of `require_site`.

    Args:
        suffixes: what follows a module's path, without the adapter's name: "lora_A.weight", "hada_w1_a". A `*` stands
            for one part: "peanut_encoders.*.weight".
        shared: what follows `base_model.`, the same way: "vera_A", "tinylora_v.*".
        irrelevant: suffixes of tensors that training keeps and that change nothing at inference; `**` stands for any
            parts.

    Raises:
        MalformedAdapter: a name does not begin with the prefix, or two tensors are the same under two names.
        UnsupportedAdapter: a tensor is unknown.
        BaseMismatch: a replaced parameter belongs to a module that the base lacks.
    """
    of_module, of_all, of_nothing = _suffix_pattern(suffixes), _name_pattern(shared), _suffix_pattern(irrelevant)
    named = _suffix_pattern([_with_a_name(suffix) for suffix in suffixes])
    sorting = _Sorting()
    for name in header:
        rest, is_shared = _without_prefix(name)
        if is_shared:
            if of_all is None or of_all.fullmatch(rest) is None:
                _refuse_unknown(name)
            _put(sorting.shared, rest, name)
        elif of_module is not None and (found := of_module.fullmatch(rest)):
            _put(sorting.modules.setdefault(found["path"], {}), found["suffix"], name)
        elif _TRAINING_ONLY.fullmatch(rest) or (of_nothing is not None and of_nothing.fullmatch(rest)):
            sorting.irrelevant.append(name)
        elif named is not None and (found := named.fullmatch(rest)):
            _refuse_named(name, found["path"])
        else:
            sorting.saved.append((rest, name))
    saved = SavedModules.sort(sorting.saved, spec, adapted=sorting.modules)
    return TunerFile(sorting.modules, sorting.shared, saved, tuple(sorting.irrelevant))


def require_site(path: str, name: str, spec: BaseModelSpec, kinds: Collection[SiteKind] = ("linear", "head")) -> Site:
    """The site that a tensor belongs to.

    Raises:
        UnsupportedAdapter: the module is there, but is not of these kinds.
        BaseMismatch: the base lacks the module.
    """
    site = spec.sites.get(path)
    if site is not None and site.kind in kinds:
        return site
    if "experts" in path.split("."):
        raise UnsupportedAdapter(
            f'tensor "{name}" adapts expert weights, which this kind is not served on. '
            "Train on the attention modules only.",
            tensor=name,
        )
    if site is not None or path in spec.other_modules or path in spec.norms:
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


def require_all(tensors: Mapping[str, str], path: str, suffixes: Collection[str]) -> None:
    """Raises MalformedAdapter, naming what is there, where a module lacks one of its tensors."""
    for suffix in suffixes:
        if suffix not in tensors:
            name = next(iter(tensors.values()))
            raise MalformedAdapter(
                f'tensor "{name}" is there, but {suffix} of "{path}" is missing. '
                "The file is incomplete; save or upload the adapter again.",
                tensor=name,
            )


def _without_prefix(name: str) -> tuple[str, bool]:
    """The name without its prefix and without the adapter's name; and whether it is shared by all modules."""
    if not name.startswith(SHARED_PREFIX):
        raise MalformedAdapter(
            f'tensor "{name}" does not begin with "{PREFIX}", so it belongs to no module; PEFT would drop it in '
            "silence and serve the bare base. Save the adapter with PEFT's save_pretrained.",
            tensor=name,
        )
    is_shared = not name.startswith(PREFIX)
    rest = name.removeprefix(SHARED_PREFIX if is_shared else PREFIX)
    return without_adapter_name(rest), is_shared


def without_adapter_name(name: str) -> str:
    """A tensor's name as PEFT writes it, of one in which an exporter left the adapter's name."""
    return ".".join(part for part in name.split(".") if part not in _LEFT_IN)


def _put(names: dict[str, str], key: str, name: str) -> None:
    if key in names:
        raise MalformedAdapter(
            f'tensor "{name}" and tensor "{names[key]}" are the same under two names. Save the adapter again.',
            tensor=name,
        )
    names[key] = name


def _with_a_name(suffix: str) -> str:
    """How a suffix looks with an adapter's name in it: after its first part, as PEFT has it in memory."""
    first, dot, rest = suffix.partition(".")
    return f"{first}.*{dot}{rest}"


def _refuse_named(name: str, path: str) -> NoReturn:
    raise MalformedAdapter(
        f'tensor "{name}" still has an adapter\'s own name after "{path}", as in memory. A file holds one adapter, '
        "without its name: save it with PEFT's save_pretrained, and serve the folder of that adapter.",
        tensor=name,
    )


def _refuse_unknown(name: str) -> NoReturn:
    raise UnsupportedAdapter(
        f'tensor "{name}" is unknown here. It may change what the adapter computes; '
        "remove it from the file if it does not.",
        tensor=name,
    )


def _suffix_pattern(suffixes: Collection[str]) -> re.Pattern[str] | None:
    return re.compile(rf"(?P<path>.+)\.(?P<suffix>{_alternatives(suffixes)})") if suffixes else None


def _name_pattern(names: Collection[str]) -> re.Pattern[str] | None:
    return re.compile(_alternatives(names)) if names else None


def _alternatives(names: Collection[str]) -> str:
    return "|".join(
        re.escape(name).replace(r"\*\*", ".+").replace(r"\*", "[^.]+") for name in sorted(names, key=len, reverse=True)
    )
