"""Prefix tuning of AdapterHub (Li & Liang 2021): keys and values before those of the prompt, in every layer.

    ...prefix_tunings.<name>.self_prefix.wte.weight               [tokens, hidden_size]
    ...prefix_tunings.<name>.self_prefix.control_trans.0.weight   [inner, hidden_size], and .bias
    ...prefix_tunings.<name>.self_prefix.control_trans.2.weight   [2 * layers * kv_heads * head_dim, inner], and .bias
    ...prefix_tunings.<name>.self_prefix.control_trans            all of them, where `flat`

The network is evaluated here, once: [tokens, layers, (key, value), kv_heads, head_dim]. Keys are used as they are, not
rotated, and the prompt begins at position 0, not behind the prefix as in PEFT. The same tensors stand in the file once
for every layer. The library computes this under eager attention only; under others it masks a part of the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from peft_core.activations import ACTIVATIONS
from peft_core.errors import MalformedAdapter
from peft_core.forms import Activation, AdapterForms, KVPrefix
from peft_core.methods.adapterhub.fields import TRAINING_ONLY, activation, flag, layers_left_out, refuse_gates
from peft_core.methods.adapterhub.layout import Layout
from peft_core.methods.adapterhub.part import Reader
from peft_core.methods.adapterhub.tensors import HubTensors, Names, num_values, require_names, require_shape
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.report import FormName, MatchedSite
from peft_core.methods.tensors import require_finite
from peft_core.spec import BaseModelSpec

_FLAT = "self_prefix.control_trans"
_NETWORK = (
    "self_prefix.wte.weight",
    "self_prefix.control_trans.0.weight",
    "self_prefix.control_trans.0.bias",
    "self_prefix.control_trans.2.weight",
    "self_prefix.control_trans.2.bias",
)
_DEFAULT_TOKENS, _DEFAULT_INNER = 30, 512


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    names: Names  # suffix -> tensor name
    all_copies: tuple[Names, ...]  # those beside `names`
    activation: Activation
    num_tokens: int
    spec: BaseModelSpec
    num_parameters: int
    sites: tuple[MatchedSite, ...] = ()
    forms: tuple[FormName, ...] = ("prefix",)
    needs_base: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def copies(self) -> tuple[str, ...]:
        return tuple(name for copy in self.all_copies for name in copy.values())

    def read(self, reader: Reader) -> AdapterForms:
        values = {suffix: reader.read(name) for suffix, name in self.names.items()}
        for copy in self.all_copies:
            for suffix, name in copy.items():
                _require_same(reader.read(name), values[suffix], name, self.names[suffix])
        if _FLAT in values:
            flat = values[_FLAT]
        else:
            rows, down, down_bias, up, up_bias = (values[suffix] for suffix in _NETWORK)
            flat = functional.linear(
                ACTIVATIONS[self.activation](functional.linear(rows, down, down_bias)), up, up_bias
            )
            require_finite(flat, self.names[_NETWORK[0]])
        spec = self.spec
        parts = flat.view(self.num_tokens, spec.num_layers, 2, spec.num_kv_heads, spec.head_dim).transpose(0, 1)
        keys, values_ = parts[:, :, 0].contiguous(), parts[:, :, 1].contiguous()
        return AdapterForms(prefix=KVPrefix(keys, values_, first_position=0))


def plan_prefix(ledger: ConfigLedger, tensors: HubTensors, layout: Layout | None, spec: BaseModelSpec) -> PrefixPlan:
    """Decide everything about a prefix, and take its tensors.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor.
    """
    if layout is None or layout.is_hooked:
        refuse("architecture", "prefix_tuning", f"the library has no prefixes on {spec.model_type}.")
    if not spec.num_kv_heads or not spec.head_dim:
        refuse("architecture", "prefix_tuning", "the shape of this base's keys and values is not known.")
    refuse_gates(ledger)
    ledger.set_aside(TRAINING_ONLY)
    is_flat = flag(ledger, "flat", default=False)
    num_tokens = ledger.use_count("prefix_length") or _DEFAULT_TOKENS
    inner = ledger.use_count("bottleneck_size") or _DEFAULT_INNER
    act = activation(ledger, "tanh")
    left_out = layers_left_out(ledger) & set(range(spec.num_layers))
    ledger.close()
    if left_out:
        refuse("leave_out", sorted(left_out), "a prefix in some layers only is not served.")
    copies = tensors.prefixes()
    names = copies[0] if copies else {}
    per_token = spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {_FLAT: (num_tokens * per_token,)}
    if not is_flat:
        sizes = ((num_tokens, spec.hidden_size), (inner, spec.hidden_size), (inner,), (per_token, inner), (per_token,))
        shapes = dict(zip(_NETWORK, sizes, strict=True))
    for copy in copies or [names]:
        require_names(copy, tuple(shapes), "the prefix")
        for suffix, shape in shapes.items():
            require_shape(tensors.header, copy[suffix], shape, of_base="control_trans.2" in suffix)
    num_parameters = sum(num_values(tensors.header, name) for name in names.values())
    return PrefixPlan(names, tuple(copies[1:]), act, num_tokens, spec, num_parameters)


def _require_same(values: torch.Tensor, expected: torch.Tensor, name: str, other: str) -> None:
    if not torch.equal(values, expected):
        raise MalformedAdapter(
            f'tensor "{name}" and tensor "{other}" are copies of one, but hold different values. '
            "The file is damaged; save the adapter again.",
            tensor=name,
        )
