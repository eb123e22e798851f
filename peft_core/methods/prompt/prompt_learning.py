"""What all kinds of prompt learning in PEFT have in common: their config, and a file without the tuners' prefixes.

    prompt_embeddings              [virtual tokens, ...]    already evaluated: no encoder and no projection is stored
    base_model.<path>.weight       replaced; ONE `base_model.`, where the files of tuners have `base_model.model.`

Running example: {"modules_to_save": ["norm"]} beside 20 virtual tokens of a Llama
    base_model.model.norm.weight is the base's `model.norm` (in a tuner's file it would be a module `norm`)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter, shown
from peft_core.forms import AdapterForms
from peft_core.methods.base_weights import BaseWeights
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.report import DecodeReport, FormName
from peft_core.methods.tensors import FLOAT_DTYPES, Header, TensorSource
from peft_core.methods.tuner.config import TunerConfig, read_origin
from peft_core.methods.tuner.file import SHARED_PREFIX, without_adapter_name
from peft_core.methods.tuner.merging import merged
from peft_core.methods.tuner.saved_modules import SavedModules
from peft_core.methods.tuner.saved_plan import SavedPlan
from peft_core.spec import BaseModelSpec

ROWS = "prompt_embeddings"


@dataclass(frozen=True, slots=True)
class PromptDraft:
    """A file and its config, sorted. The kind takes its own fields off the ledger; `report` closes it."""

    kind: str
    ledger: ConfigLedger
    config: TunerConfig
    own: tuple[str, ...]  # names of the kind's own tensors, all present
    irrelevant: tuple[str, ...]
    saved: SavedPlan
    header: Header
    spec: BaseModelSpec

    def num_tokens(self) -> int:
        """Virtual tokens, as file and config agree on them."""
        count = int(self.shape(ROWS, 2)[0])
        stated = self.ledger.use_count("num_virtual_tokens")
        if stated is not None and stated != count:
            raise MalformedAdapter(
                f'tensor "{ROWS}" has {count} rows, and field "num_virtual_tokens" is {stated}. '
                "Correct adapter_config.json, or save the adapter again.",
                tensor=ROWS,
            )
        if self.spec.max_position is not None and count >= self.spec.max_position:
            raise BaseMismatch(
                f'tensor "{ROWS}" has {count} virtual tokens; this base takes {self.spec.max_position} tokens in all, '
                "so none would be left for a prompt. Use the base that the adapter was trained on.",
                tensor=ROWS,
            )
        return count

    def shape(self, name: str, num_dimensions: int) -> tuple[int, ...]:
        """The shape of one of the kind's own tensors.

        Raises:
            MalformedAdapter: it is no float tensor of so many dimensions, none of them empty.
        """
        entry = self.header[name]
        if entry.dtype in FLOAT_DTYPES and len(entry.shape) == num_dimensions and min(entry.shape) >= 1:
            return tuple(entry.shape)
        raise MalformedAdapter(
            f'tensor "{name}" has dtype {entry.dtype} and shape {list(entry.shape)}; expected floats in '
            f"{num_dimensions} dimensions, none of them empty. Save the adapter again.",
            tensor=name,
        )

    def require(self, name: str, expected: tuple[int, ...], what: str) -> None:
        """Raises BaseMismatch, where a tensor does not have the shape that `what` of this base needs."""
        got = self.shape(name, len(expected))
        if got != expected:
            raise BaseMismatch(
                f'tensor "{name}" has shape {list(got)}; {what} of this base needs {list(expected)}. '
                "Use the base that the adapter was trained on.",
                tensor=name,
            )

    def require_field(self, field: str, expected: int) -> None:
        """Take a count; raises BaseMismatch where it is there and is not this base's."""
        stated = self.ledger.use_count(field)
        if stated is not None and stated != expected:
            raise BaseMismatch(
                f'field "{field}" = {shown(stated)}; this base has {expected}. '
                "Use the base that the adapter was trained on.",
                field=field,
                value=stated,
            )

    def report(self, form: FormName, *, warnings: tuple[str, ...] = ()) -> DecodeReport:
        """Raises UnsupportedAdapter for a field that nobody took."""
        self.ledger.close()
        other_base = self.config.other_base(self.spec)
        return DecodeReport(
            kind=self.kind,
            sites=(),
            num_parameters=sum(math.prod(self.header[name].shape) for name in self.own) + self.saved.num_parameters,
            irrelevant_fields=self.ledger.irrelevant,
            irrelevant_tensors=self.irrelevant,
            warnings=(*([other_base] if other_base else []), *warnings, *self.saved.warnings),
            forms=(form, *self.saved.forms),
            needs_base=self.saved.needs_base,
        )

    def with_saved(self, forms: AdapterForms, tensors: TensorSource, base: BaseWeights | None) -> AdapterForms:
        """The kind's forms and the replaced parameters. The virtual tokens pass through these like any token."""
        return merged(forms, self.saved.read(tensors, base))


def draft_prompt(
    kind: str,
    config: Mapping[str, Any],
    header: Header,
    spec: BaseModelSpec,
    *,
    own: tuple[str, ...] = (ROWS,),
    irrelevant: Mapping[str, str],
) -> PromptDraft:
    """Sort a file, and take the common fields off a new ledger.

    Args:
        own: names of the kind's tensors, all of which must be there.
        irrelevant: field -> why it does not change the outputs, beside the common ones.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    common = _read_common(ledger)
    ledger.set_aside(irrelevant)
    for name in own:
        if name not in header:
            _refuse_missing(name, kind, header)
    saved: list[tuple[str, str]] = []
    unused: list[str] = []
    for name in header:
        if name in own:
            continue
        if not name.startswith(SHARED_PREFIX):
            raise UnsupportedAdapter(
                f'tensor "{name}" is unknown here: a {kind} file holds {", ".join(own)} and parameters of the base '
                f'that begin with "{SHARED_PREFIX}". It may change what the adapter computes; '
                "remove it if it does not.",
                tensor=name,
            )
        rest = without_adapter_name(name.removeprefix(SHARED_PREFIX))
        if ".original_module." in rest:
            unused.append(name)
        else:
            saved.append((rest, name))
    plan = SavedModules.sort(saved, spec, adapted=()).check(common, header, spec)
    return PromptDraft(kind, ledger, common, own, tuple(unused), plan, header, spec)


def _read_common(ledger: ConfigLedger) -> TunerConfig:
    base_name = read_origin(ledger)
    submodules = ledger.use_count("num_transformer_submodules")
    if submodules not in (None, 1):
        refuse(
            "num_transformer_submodules",
            submodules,
            "virtual tokens for an encoder and a decoder; only decoder-only models are served.",
        )
    return TunerConfig(rule=None, modules_to_save=ledger.use_list("modules_to_save"), base_name=base_name)


def _refuse_missing(name: str, kind: str, header: Header) -> NoReturn:
    raise MalformedAdapter(
        f'a {kind} adapter needs a tensor "{name}", and the file does not have it (it has {len(header)} others). '
        "Save the adapter with PEFT's save_pretrained.",
        tensor=name,
    )
