"""Which tensor of an AdapterHub file is what, told from its name, and the account of those that are left.

    model.layers.0.output_adapters.adapters.<name>.adapter_down.0.weight      a bottleneck in layer 0
    model.layers.0.self_attn.q_proj.loras.<name>.lora_A                       a linear
    model.prefix_tuning.prefix_tunings.<name>.self_prefix.wte.weight          a prefix; copies stand in every layer
    model.shared_parameters.<name>.phm_rule                                   what the adapter's modules share
    lm_head.weight                                                            a head that was saved beside the adapter

A file that was saved from a model without head lacks the first part of each path; it is put back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NoReturn

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.methods.adapterhub.layout import Place
from peft_core.methods.tensors import FLOAT_DTYPES, Header
from peft_core.spec import BaseModelSpec

Names = dict[str, str]  # suffix -> tensor name
_GROUPS = "adapters|loras|prefix_tunings|shared_parameters|prefix_gates|refts|prompt_tunings|invertible_adapters"
_ANY_NAME = "[^.]+"
_NEVER: Mapping[str, str] = {
    "prefix_gates": "a gate that averages over the whole sequence, which no token may see",
    "refts": "an intervention at counted positions (ReFT)",
    "prompt_tunings": "prompt tuning, which the library itself runs in no decoder",
    "invertible_adapters": "an invertible adapter behind the embeddings",
}


class HubTensors:
    """The tensors of one adapter; each is taken once, and `close` refuses what nobody took."""

    def __init__(self, header: Header, name: str, spec: BaseModelSpec) -> None:
        """Raises MalformedAdapter, UnsupportedAdapter: a tensor is another adapter's or unknown, or there are none."""
        self.header = header
        self.adapter = name
        self.head: Names = {}
        self._groups: dict[str, dict[str, Names]] = {}  # group -> path -> suffix -> tensor name
        self._lent: set[str] = set()
        unknown: list[str] = []
        heads = [path for path, site in spec.sites.items() if site.kind == "head"]
        of_this, of_any = _expression(re.escape(name)), _expression(_ANY_NAME)
        for tensor in header:
            found = of_this.fullmatch(tensor) or of_any.fullmatch(tensor)
            if found is not None:
                self._add(tensor, found)
            elif tensor.rpartition(".")[0] in heads:
                self.head[tensor.rpartition(".")[2]] = tensor
            else:
                unknown.append(tensor)
        if not self._groups:
            raise MalformedAdapter(
                f"the file has {len(header)} tensors, none of them an adapter's. "
                f'Expected names such as "model.layers.0.output_adapters.adapters.{name}.adapter_up.weight".'
            )
        if unknown:
            _refuse(unknown[0], "is unknown here. It may change what the adapter computes; remove it if it does not.")
        self._root_paths(spec)

    def bottleneck(self, layer: str, place: Place) -> Names:
        """Take the tensors of one bottleneck."""
        return self._take("adapters", f"{layer}.{place}")

    def linear(self, path: str) -> Names:
        """Take the tensors of one linear."""
        return self._take("loras", path)

    def linears(self) -> tuple[str, ...]:
        """Paths of the linears whose tensors are not taken."""
        return tuple(self._groups.get("loras", {}))

    def prefixes(self) -> list[Names]:
        """Take all copies of the prefix."""
        return list(self._groups.pop("prefix_tunings", {}).values())

    def lend_shared(self, suffixes: tuple[str, ...]) -> Names:
        """Take some of the shared tensors, perhaps not for the first time; those that are missing are left out."""
        paths = self._groups.get("shared_parameters", {}).values()
        found = {suffix: names[suffix] for names in paths for suffix in suffixes if suffix in names}
        self._lent |= set(found.values())
        return found

    def close(self) -> None:
        """Raises UnsupportedAdapter, naming the first tensor that nobody took."""
        for group, paths in self._groups.items():
            for names in paths.values():
                for tensor in (name for name in names.values() if name not in self._lent):
                    if group in _NEVER:
                        _refuse(tensor, f"belongs to {_NEVER[group]}: not served.")
                    _refuse(
                        tensor,
                        "belongs to nothing that the config speaks of, so the library would drop it in silence. "
                        "Correct the config, or remove the tensor.",
                    )

    def _add(self, tensor: str, found: re.Match[str]) -> None:
        if found["name"] != self.adapter:
            raise MalformedAdapter(
                f'tensor "{tensor}" belongs to an adapter "{found["name"]}", but the config is of "{self.adapter}". '
                "Save each adapter in a directory of its own.",
                tensor=tensor,
            )
        paths = self._groups.setdefault(found["group"], {})
        paths.setdefault(found["path"].rstrip("."), {})[found["suffix"]] = tensor

    def _take(self, group: str, path: str) -> Names:
        return self._groups.get(group, {}).pop(path, {})

    def _root_paths(self, spec: BaseModelSpec) -> None:
        """Put the first part of each path back where the file lacks it."""
        root = next((path.partition(".")[0] for path, site in spec.sites.items() if site.kind == "embedding"), "")
        paths = [path for group in self._groups.values() for path in group]
        if not root or any(path == root or path.startswith(f"{root}.") for path in paths):
            return
        for group, inner in self._groups.items():
            self._groups[group] = {f"{root}.{path}" if path else root: names for path, names in inner.items()}


def _expression(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?P<path>(?:.+\.)?)(?P<group>{_GROUPS})\.(?P<name>{name})\.(?P<suffix>.+)")


def require_names(names: Names, expected: tuple[str, ...], what: str) -> None:
    """Check that a module has exactly these tensors.

    Raises:
        MalformedAdapter: one is missing.
        UnsupportedAdapter: there is one more.
    """
    for suffix in expected:
        if suffix not in names:
            raise MalformedAdapter(
                f'{what} has no tensor "{suffix}", but its config needs one; untrained it would be random. '
                "The file is incomplete; save or upload the adapter again.",
                tensor=next(iter(names.values()), None),
            )
    for suffix, tensor in names.items():
        if suffix not in expected:
            _refuse(tensor, f"is not part of {what} as its config describes it. Correct the config, or remove it.")


def require_shape(header: Header, tensor: str, expected: tuple[int, ...], *, of_base: bool = False) -> None:
    """Check dtype and shape of a tensor.

    Args:
        of_base: the base decides the shape, not the config.

    Raises:
        MalformedAdapter, BaseMismatch: it has another.
    """
    entry = header[tensor]
    if entry.dtype not in FLOAT_DTYPES:
        raise MalformedAdapter(
            f'tensor "{tensor}" has dtype {entry.dtype}; expected one of {", ".join(FLOAT_DTYPES)}. '
            "Save the adapter in a floating-point type.",
            tensor=tensor,
        )
    if tuple(entry.shape) == expected:
        return
    got = f'tensor "{tensor}" has shape {list(entry.shape)}'
    if of_base:
        raise BaseMismatch(
            f"{got}; this base needs {list(expected)}. Use the base that the adapter was trained on.", tensor=tensor
        )
    raise MalformedAdapter(
        f"{got}; its config says {list(expected)}. The file is damaged, or its config was changed; save it again.",
        tensor=tensor,
    )


def num_values(header: Header, tensor: str) -> int:
    count = 1
    for size in header[tensor].shape:
        count *= size
    return count


def _refuse(tensor: str, sentence: str) -> NoReturn:
    raise UnsupportedAdapter(f'tensor "{tensor}" {sentence}', tensor=tensor)
