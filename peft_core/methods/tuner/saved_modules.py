"""Parameters of the base that an adapter replaces: which tensor is which, told from its name.

    base_model.model.<path>.weight | .bias                              replaced (modules_to_save, bias, new vocabulary)
    base_model.model.<path>.base_layer.weight | .base_layer.bias        the same, where the module is adapted as well
    base_model.model.<path>.token_adapter.trainable_tokens_delta        rows of single tokens

Stored are new values, never differences, whatever a name says. The file decides what is replaced: PEFT loads such a
tensor into the base by its name, whether modules_to_save lists it or not; but what is listed must be there.

Running example: {"modules_to_save": ["norm"]} on a Llama saves every `...layernorm` too, since PEFT compares the ends
of paths letter by letter; the file has them all, and all are replaced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.methods.tensors import FLOAT_DTYPES, Header
from peft_core.methods.tuner.config import TunerConfig, some
from peft_core.methods.tuner.saved_plan import SavedPlan, StoredWeight
from peft_core.methods.tuner.token_rows import StoredRows, grown_tables, match_rows
from peft_core.methods.tuner.vocabulary import Vocabulary
from peft_core.spec import BaseModelSpec

_PARAMETER = re.compile(r"(?P<path>.+?)\.(?P<copy>(token_adapter\.)?base_layer\.)?(?P<parameter>weight|bias)")
_ROWS = re.compile(r"(?P<path>.+?)\.token_adapter\.trainable_tokens_delta")
_TOKENS_FIELD = "trainable_token_indices"


@dataclass(frozen=True, slots=True)
class SavedModules:
    """Names of the tensors that replace parameters of the base."""

    weights: Mapping[str, str] = field(default_factory=dict)  # by module path
    biases: Mapping[str, str] = field(default_factory=dict)  # by module path
    copies: Mapping[str, str] = field(default_factory=dict)  # weights of adapted modules, mostly the base's own
    token_rows: Mapping[str, str] = field(default_factory=dict)  # by path of the embedding or the head

    @classmethod
    def sort(cls, names: Iterable[tuple[str, str]], spec: BaseModelSpec, adapted: Collection[str]) -> SavedModules:
        """Tell the parameters of the base by their names.

        Args:
            names: a name without prefix, and the tensor's full name.
            adapted: paths that the kind itself changes.

        Raises:
            UnsupportedAdapter: a tensor is no parameter that can be replaced.
            BaseMismatch: it belongs to a module that the base lacks.
        """
        kinds: dict[str, dict[str, str]] = {"weight": {}, "bias": {}, "copy": {}, "rows": {}}
        for rest, name in names:
            kind, path, is_copy = _told(rest, name, spec)
            if path in adapted and not is_copy:
                _refuse_doubly_changed(path, name)
            if path in kinds[kind]:
                _refuse_same(name, kinds[kind][path])
            kinds[kind][path] = name
        return cls(kinds["weight"], kinds["bias"], kinds["copy"], kinds["rows"])

    def check(
        self, config: TunerConfig, header: Header, spec: BaseModelSpec, *, tokens_field: str = _TOKENS_FIELD
    ) -> SavedPlan:
        """Hold every replaced parameter against the base and the config.

        Args:
            tokens_field: of the config, that lists the tokens of replaced rows.

        Raises:
            UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
        """
        vocabulary = Vocabulary.of(spec)
        weights = self._with_twins(config, vocabulary)
        for path, stored in weights.items():
            _check_weight(path, stored.name, header, spec, vocabulary)
        for path, name in self.biases.items():
            _check_bias(path, name, header, spec)
        num_rows = _common_rows(weights, header, vocabulary)
        rows = match_rows(self.token_rows, config.token_indices, header, spec, field=tokens_field)
        grown = () if num_rows is not None else grown_tables(rows, spec)
        if grown:
            num_rows = 1 + max(token for row in rows for token in row.token_ids)
        self._check_rows(rows, num_rows, config, vocabulary)
        self._check_listed(config, spec, vocabulary)
        trained = (*self.weights.values(), *self.biases.values(), *self.token_rows.values())
        return SavedPlan(
            spec=spec,
            weights=weights,
            biases=self.biases,
            rows=rows,
            vocabulary=num_rows,
            grown=grown,
            num_parameters=sum(math.prod(header[name].shape) for name in trained),
            warnings=tuple(_warnings(config, self.biases, spec)),
        )

    def _with_twins(self, config: TunerConfig, vocabulary: Vocabulary) -> dict[str, StoredWeight]:
        """Every replaced weight. Where embedding and head are one weight, a value that PEFT loads into the base
        itself replaces both; that of a module in modules_to_save, which PEFT copies first, replaces the copy alone."""
        own = {path: StoredWeight(name, is_copy=False) for path, name in self.weights.items()}
        own |= {path: StoredWeight(name, is_copy=True) for path, name in self.copies.items()}
        result = dict(own)
        for path, stored in own.items():
            twin = vocabulary.twin(path)
            if twin is None or twin in own:
                continue
            is_module = not stored.is_copy and any(path.endswith(entry) for entry in config.modules_to_save)
            if not is_module or config.ties_weights:
                result[twin] = stored
        return result

    def _check_rows(
        self, rows: tuple[StoredRows, ...], num_rows: int | None, config: TunerConfig, vocabulary: Vocabulary
    ) -> None:
        for row in rows:
            size = num_rows or vocabulary.size(row.path)
            beyond = [token for token in row.token_ids if size is not None and token >= size]
            if beyond:
                raise BaseMismatch(
                    f'tensor "{row.name}" holds the row of token {beyond[0]}, but "{row.path}" has {size} rows. Save '
                    "the adapter with save_embedding_layers=True, so that its file has the larger table.",
                    tensor=row.name,
                )
            if row.path in self.weights and any(row.path.endswith(entry) for entry in config.modules_to_save):
                raise UnsupportedAdapter(
                    f'tensor "{row.name}" replaces rows of "{row.path}", which tensor "{self.weights[row.path]}" '
                    f"replaces as a whole. PEFT does not serve both; train with {_TOKENS_FIELD} or modules_to_save.",
                    tensor=row.name,
                )

    def _check_listed(self, config: TunerConfig, spec: BaseModelSpec, vocabulary: Vocabulary) -> None:
        """What modules_to_save means must be in the file: PEFT cannot load the adapter otherwise."""
        for path, parameter in _listed(config, spec):
            stored = self.weights if parameter == "weight" else self.biases
            if path in stored or (config.ties_weights and vocabulary.twin(path) in stored):
                continue
            raise MalformedAdapter(
                f'field "modules_to_save" means "{path}", but the file has no tensor for its {parameter}. '
                "The file is incomplete; save or upload the adapter again.",
                field="modules_to_save",
                value=list(config.modules_to_save),
            )


def _told(rest: str, name: str, spec: BaseModelSpec) -> tuple[str, str, bool]:
    """(what it is, path, whether it stands beside an adapter on the same module) of one tensor."""
    if found := _ROWS.fullmatch(rest):
        return "rows", found["path"], False
    if rest in spec.expert_parameters:
        raise UnsupportedAdapter(
            f'tensor "{name}" replaces the weights of all experts, which is not served. Leave them out of '
            "modules_to_save.",
            tensor=name,
        )
    found = _PARAMETER.fullmatch(rest)
    if found is None or (found["path"] not in spec.sites and _owner(found["path"], spec) is not None):
        raise UnsupportedAdapter(
            f'tensor "{name}" is unknown here, where modules of this kind have other tensors. It may change what the '
            "adapter computes; remove it from the file if it does not.",
            tensor=name,
        )
    is_copy = found["copy"] is not None
    return "copy" if is_copy and found["parameter"] == "weight" else found["parameter"], found["path"], is_copy


def _owner(path: str, spec: BaseModelSpec) -> str | None:
    """The site inside which a path would lie."""
    parts = path.split(".")
    return next((site for end in range(1, len(parts)) if (site := ".".join(parts[:end])) in spec.sites), None)


def _check_weight(path: str, name: str, header: Header, spec: BaseModelSpec, vocabulary: Vocabulary) -> None:
    site, norm = spec.sites.get(path), spec.norms.get(path)
    if site is None:
        if norm is None:
            _refuse_path(path, name, spec)
        _require(path, name, header, [norm.width])
        return
    rows_first = [site.in_features, site.out_features]
    shape = rows_first if site.kind == "embedding" or site.transposed else rows_first[::-1]
    if vocabulary.size(path) is not None and len(header[name].shape) == 2:
        if header[name].shape[0] != shape[0] and site.kind == "head" and site.has_bias:
            raise UnsupportedAdapter(
                f'tensor "{name}" has {header[name].shape[0]} rows, "{path}" of this base {shape[0]}: a larger '
                "vocabulary is not served on a head with a bias. Save the model that was resized, and serve it.",
                tensor=name,
            )
        shape = [header[name].shape[0], shape[1]]
    _require(path, name, header, shape)


def _check_bias(path: str, name: str, header: Header, spec: BaseModelSpec) -> None:
    site, norm = spec.sites.get(path), spec.norms.get(path)
    if site is not None and site.has_bias:
        _require(path, name, header, [site.out_features])
    elif norm is not None and norm.has_bias:
        _require(path, name, header, [norm.width])
    elif site is not None or norm is not None:
        raise BaseMismatch(
            f'tensor "{name}" replaces a bias, and "{path}" of this base has none. '
            "Use the base that the adapter was trained on.",
            tensor=name,
        )
    else:
        _refuse_path(path, name, spec)


def _require(path: str, name: str, header: Header, expected: list[int]) -> None:
    entry = header[name]
    if entry.dtype not in FLOAT_DTYPES:
        raise MalformedAdapter(
            f'tensor "{name}" has dtype {entry.dtype}; expected one of {", ".join(FLOAT_DTYPES)}. '
            "Save the adapter in a floating-point type.",
            tensor=name,
        )
    if list(entry.shape) != expected or not all(expected):
        raise BaseMismatch(
            f'tensor "{name}" has shape {list(entry.shape)}; "{path}" of this base needs {expected}. '
            "Use the base that the adapter was trained on.",
            tensor=name,
        )


def _common_rows(weights: Mapping[str, StoredWeight], header: Header, vocabulary: Vocabulary) -> int | None:
    """Rows of the adapter's tables, None where they are as many as the base's. Raises BaseMismatch: they differ."""
    sites = [site for site in (vocabulary.embedding, vocabulary.head) if site is not None]
    own = {site.path: vocabulary.size(site.path) for site in sites}
    new = {path: header[weights[path].name].shape[0] if path in weights else size for path, size in own.items()}
    if new == own:
        return None
    if len(set(new.values())) == 1:
        return next(iter(new.values()))
    sizes = ", ".join(f'"{path}" {size}' for path, size in new.items())
    name = next(weights[path].name for path in new if path in weights and new[path] != own[path])
    raise BaseMismatch(
        f'tensor "{name}" makes the vocabulary another one on one side only; rows are {sizes}. '
        "Save the adapter with save_embedding_layers=True, so that its file has both tables.",
        tensor=name,
    )


def _listed(config: TunerConfig, spec: BaseModelSpec) -> Iterator[tuple[str, str]]:
    """(path, parameter) of everything that modules_to_save means: the modules whose path ends so, and all inside."""
    modules = (*spec.sites, *spec.norms, *spec.other_modules)
    roots = [path for path in modules if any(path.endswith(entry) for entry in config.modules_to_save)]
    for path in (*spec.sites, *spec.norms):
        if any(path == root or path.startswith(f"{root}.") for root in roots):
            has_bias = spec.sites[path].has_bias if path in spec.sites else spec.norms[path].has_bias
            yield from ((path, "weight"), (path, "bias")) if has_bias else ((path, "weight"),)


def _warnings(config: TunerConfig, biases: Mapping[str, str], spec: BaseModelSpec) -> Iterator[str]:
    paths = (*spec.sites, *spec.norms, *spec.other_modules)
    absent = [entry for entry in config.modules_to_save if not any(path.endswith(entry) for path in paths)]
    if absent:
        yield f"modules_to_save names {some(absent)}, which this base does not have: nothing is replaced for it."
    if config.bias != "none" and not biases:
        yield f'The config says bias="{config.bias}", but the file has no biases: they are left as in the base.'


def _refuse_path(path: str, name: str, spec: BaseModelSpec) -> NoReturn:
    if path in spec.other_modules:
        raise UnsupportedAdapter(
            f'tensor "{name}" replaces parameters of "{path}", which is no linear, embedding, head or norm: not '
            "served. Leave it out of modules_to_save.",
            tensor=name,
        )
    raise BaseMismatch(
        f'tensor "{name}" replaces parameters of "{path}", which this base ({spec.model_type}) does not have. '
        "Use the base that the adapter was trained on.",
        tensor=name,
    )


def _refuse_doubly_changed(path: str, name: str) -> NoReturn:
    raise UnsupportedAdapter(
        f'tensor "{name}" replaces a parameter of "{path}", which has an adapter as well; PEFT would drop one of them '
        "in silence. Leave the module out of target_modules or of modules_to_save.",
        tensor=name,
    )


def _refuse_same(name: str, other: str) -> NoReturn:
    raise MalformedAdapter(
        f'tensor "{name}" and tensor "{other}" are the same parameter under two names. Save the adapter again.',
        tensor=name,
    )
