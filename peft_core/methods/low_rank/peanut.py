"""PEANuT: a small network that reads the base's weight and writes the change to it.

    base_model.model.<path>.peanut_A.weight            [r, out_features]
    base_model.model.<path>.peanut_B.weight            [out_features, r]
    base_model.model.<path>.peanut_encoders.<i>.weight [r, r]     for i < depth
    base_model.model.<path>.peanut_decoders.<i>.weight [r, r]     for i < depth

    Semantics, f the activation, applied to each row of the transposed weight:
        h = f(W^T A^T)                                          [in_features, r]
        the encoders one after the other, h = f(h encoder^T), each keeping its input;
        the decoders one after the other, h = f(h decoder^T) + the input kept last that is left
        W' = W + scaling * B h^T

Nothing of it depends on the tokens, so it is a low-rank addition. The base's weight is needed.

Running example: r = 32
    LinearDelta(down=h^T [32, in], up=scaling * B [out, 32])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from peft_core.forms import LinearDelta
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.report import MatchedSite
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.checks import whole_number
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import require_all, sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import BaseModelSpec, Site

KIND = "PEANUT"
FIRST, LAST = "peanut_A.weight", "peanut_B.weight"
_DEFAULT_RANK = 32
_MAX_DEPTH = 64  # more layers than a network of this size can use

Activation = Callable[[torch.Tensor], torch.Tensor]


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


ACTIVATIONS: Mapping[str, Activation] = {  # as transformers names them
    "gelu": functional.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "leaky_relu": functional.leaky_relu,
    "linear": _same,
    "mish": functional.mish,
    "relu": torch.relu,
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}


def plan_peanut(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a PEANuT adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger)
    rank = ledger.use_count("r") or _DEFAULT_RANK
    depth = whole_number(ledger, "depth", 0, _MAX_DEPTH + 1)
    scaling = ledger.use_number("scaling", 1.0)
    name = ledger.use("act_fn", "relu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        refuse("act_fn", name, f"known here: {', '.join(sorted(ACTIVATIONS))}. Train with one of them.")
    starts_random = not ledger.use_flag("init_weights", True)
    ledger.close()
    squares = [f"peanut_{part}.{i}.weight" for part in ("encoders", "decoders") for i in range(depth)]
    file = sort_tuner_file(header, spec, suffixes=(FIRST, LAST, *squares))

    def match(site: Site, names: Names) -> MatchedSite:
        require_all(names, site.path, (FIRST, LAST, *squares))
        shape_of(header, names[FIRST], site, (rank, "out"))
        shape_of(header, names[LAST], site, ("out", rank))
        for suffix in squares:
            shape_of(header, names[suffix], site, (rank, rank))
        return MatchedSite(site.path, rank, scaling)

    def formula(data: SiteData) -> LinearDelta:
        hidden = _hidden(data, depth, ACTIVATIONS[name])
        return LinearDelta(down=hidden.T, up=data.own[LAST] * scaling)

    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random)
    return draft.plan(match, formula, needs_base=True)


def _hidden(data: SiteData, depth: int, activation: Activation) -> torch.Tensor:
    """What the network makes of the weight.  # [in_features, r]"""
    hidden = activation(data.weight().T @ data.own[FIRST].T)
    kept: list[torch.Tensor] = []
    for i in range(depth):
        kept.append(hidden)
        hidden = activation(hidden @ data.own[f"peanut_encoders.{i}.weight"].T)
    for i in range(depth):
        hidden = activation(hidden @ data.own[f"peanut_decoders.{i}.weight"].T) + kept.pop()
    return hidden
