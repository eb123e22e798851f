"""Fields that several of AdapterHub's methods have, read the same way for each."""

from __future__ import annotations

from collections.abc import Mapping

from peft_core.errors import MalformedAdapter, shown
from peft_core.forms import Activation
from peft_core.methods.ledger import ConfigLedger, refuse

STARTS = "only says how training began"
TRAINING_ONLY: Mapping[str, str] = {
    "init_weights": STARTS,
    "init_weights_seed": STARTS,
    "dropout": "dropout is off at inference",
    "stochastic_depth": "layers are dropped in training only",
    "cross_adapter": "a decoder has no cross-attention",
    "encoder_prefix": "a decoder has no encoder",
    "cross_prefix": "a decoder has no cross-attention",
    "shared_gating": "means nothing without gates",
    "dtype": "the file says which type the tensors have",
}
_ACTIVATIONS: Mapping[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",  # the same function
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "leakyrelu": "leakyrelu",
    "leaky_relu": "leakyrelu",
    "linear": "linear",
}


def flag(ledger: ConfigLedger, field: str, *, default: bool) -> bool:
    """Take a field that is true or false."""
    value = ledger.use(field, default)
    if isinstance(value, bool):
        return value
    raise wrong(field, value, "true or false")


def activation(ledger: ConfigLedger, default: str | None) -> Activation:
    """Take the activation.

    Raises:
        UnsupportedAdapter: it is one that no form has.
    """
    value = ledger.use("non_linearity", default)
    if not isinstance(value, str):
        raise wrong("non_linearity", value, "the name of an activation")
    if value.lower() not in _ACTIVATIONS:
        refuse("non_linearity", value, f"this activation is not served. Served: {', '.join(sorted(_ACTIVATIONS))}.")
    return _ACTIVATIONS[value.lower()]


def layers_left_out(ledger: ConfigLedger) -> frozenset[int]:
    """Take the numbers of the layers that the method leaves alone."""
    value: object = ledger.use("leave_out", [])
    if isinstance(value, list | tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        return frozenset(value)
    raise wrong("leave_out", value, "a list of layer numbers")


def refuse_gates(ledger: ConfigLedger) -> None:
    """Raises UnsupportedAdapter where a gate is switched on."""
    if flag(ledger, "use_gating", default=False):
        refuse(
            "use_gating",
            True,
            "the gate is averaged over the whole sequence, so that a token would depend on those after it: "
            "not served. Train without gates.",
        )


def wrong(field: str, value: object, expected: str) -> MalformedAdapter:
    """The error for a field whose value is none of those that are expected."""
    return MalformedAdapter(
        f'field "{field}" = {shown(value)}; expected {expected}. Correct adapter_config.json.', field=field, value=value
    )
