"""The adapter_config.json of AdapterHub: what surrounds the configuration of the method, and which versions said what.

    {"config": {"architecture": null, ...}, "hidden_size": 64, "model_class": ..., "model_name": ...,
     "model_type": "llama", "name": "sql", "version": "adapters.1.3.0"}

`architecture` is null for bottlenecks; a "union" holds several configurations under `configs`, for one set of tensors.
The adapter's name is part of its tensors' names.

Two things were meant otherwise by earlier versions, and are read as the library reads them: without a `version`, the
activation "gelu" is today's "gelu_new"; before 1.1.0 LoRA was trained with scaling 1, whatever `alpha` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft_core.errors import BaseMismatch, shown
from peft_core.methods.adapterhub.fields import wrong
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.tuner.config import TunerConfig
from peft_core.spec import BaseModelSpec

_VERSION = re.compile(r"adapters\.(\d+)\.(\d+)(?:\.(\d+))?(.*)")
_BEFORE_RELEASE = re.compile(r"[._-]?(a|alpha|b|beta|c|rc|pre|preview|dev)")
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_IRRELEVANT = {
    "model_class": "the class that it was trained with",
    "config_id": "a hash of the configuration",
    "type": "what it was trained for",
    "label2id": "belongs to a classifier",
    "num_labels": "belongs to a classifier",
}
_NEVER: Mapping[str, str] = {
    "reft": "interventions at positions that are counted anew in every call (ReFT) are not served.",
    "mtl_lora": "a mixture of tasks (MTL-LoRA) is not served.",
    "prompt_tuning": "the library itself runs prompt tuning in no decoder.",
}


class Part(NamedTuple):
    """The configuration of one method."""

    architecture: str | None
    ledger: ConfigLedger
    where: str  # "config" or "config.configs[1]"


@dataclass(frozen=True, slots=True)
class Container:
    name: str
    parts: tuple[Part, ...]
    irrelevant: Mapping[str, str]  # fields of the container
    warnings: tuple[str, ...]


def read_container(config: Mapping[str, Any], spec: BaseModelSpec) -> Container:
    """Take the container apart and hold it against the base.

    Raises:
        MalformedAdapter, UnsupportedAdapter, BaseMismatch: naming the field.
    """
    ledger = ConfigLedger(config)
    method, version = ledger.use("config"), ledger.use("version")
    if not isinstance(method, dict):
        raise wrong("config", method, "the object that holds the method's configuration")
    name = ledger.use("name")
    if not isinstance(name, str) or not name or "." in name:
        raise wrong("name", name, "the adapter's name, which is part of its tensors' names")
    _require_base(ledger, spec)
    warnings = _other_base(ledger.use("model_name"), spec)
    ledger.set_aside(_IRRELEVANT)
    ledger.close()
    method, changes = _as_today(method, version)
    return Container(name, tuple(_parts(method)), ledger.irrelevant, (*warnings, *changes))


def _parts(method: dict[str, Any]) -> list[Part]:
    if method.get("architecture") != "union":
        return [_part(method, "config")]
    ledger = ConfigLedger(method)
    ledger.use("architecture")
    configs = ledger.use("configs", [])
    ledger.close()
    if not isinstance(configs, list) or not configs or not all(isinstance(config, dict) for config in configs):
        raise wrong("configs", configs, "a list of the configurations that are united")
    return [_part(config, f"config.configs[{number}]") for number, config in enumerate(configs)]


def _part(method: dict[str, Any], where: str) -> Part:
    ledger = ConfigLedger(method)
    architecture = ledger.use("architecture")
    if isinstance(architecture, str) and architecture in _NEVER:
        refuse("architecture", architecture, _NEVER[architecture])
    if architecture not in (None, "lora", "prefix_tuning"):
        refuse("architecture", architecture, "this method is unknown here. Served: bottlenecks, lora, prefix_tuning.")
    return Part(architecture, ledger, where)


def _as_today(method: dict[str, Any], version: object) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The configuration as the newest library reads a file of this version; sentences about what changed."""
    if version is None:
        activation = method.get("non_linearity")
        if isinstance(activation, str) and activation in _OLD_ACTIVATIONS:
            today = _OLD_ACTIVATIONS[activation]
            sentence = f'The config has no version: its activation "{activation}" is called "{today}" since.'
            return {**method, "non_linearity": today}, (sentence,)
        return method, ()
    if not isinstance(version, str):
        raise wrong("version", version, 'a string such as "adapters.1.3.0"')
    is_old = version.startswith("adapters.") and _is_before_1_1(version)
    if is_old and method.get("architecture") == "lora" and method.get("alpha", 8) != method.get("r", 8):
        sentence = f'The config is of version "{version}", which trained with scaling 1 whatever alpha says.'
        return {**method, "alpha": method.get("r", 8)}, (sentence,)
    return method, ()


def _is_before_1_1(version: str) -> bool:
    found = _VERSION.fullmatch(version)
    if found is None:
        raise wrong("version", version, 'a version such as "adapters.1.3.0"')
    numbers = (int(found[1]), int(found[2]), int(found[3] or 0))
    return numbers < (1, 1, 0) or (numbers == (1, 1, 0) and _BEFORE_RELEASE.match(found[4]) is not None)


def _require_base(ledger: ConfigLedger, spec: BaseModelSpec) -> None:
    stated = {"hidden_size": spec.hidden_size, "model_type": spec.model_type}
    for field, here in stated.items():
        value = ledger.use(field)
        if value is not None and value != here:
            raise BaseMismatch(
                f'field "{field}" = {shown(value)}; this base has {shown(here)}. '
                "Use the base that the adapter was trained on.",
                field=field,
                value=value,
            )


def _other_base(said: object, spec: BaseModelSpec) -> tuple[str, ...]:
    sentence = TunerConfig(rule=None, base_name=said).other_base(spec) if isinstance(said, str) and said else None
    return () if sentence is None else (sentence,)
