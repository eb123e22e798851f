"""What an adapter is, once its kind is forgotten.

Decoders (`peft_core.methods`) turn the files of one kind into these forms; everything
behind them (packing, residency, kernels, the engine) knows forms only, never kinds.

    linear site    x' = rotation(input_gain * x)
                   y  = turn(gain * base(x')) + up (down x') + dense x' + kron x' + shift
    embedding      e  = gain * (row(t) + up down[:, t])         a row may be replaced
    head           some rows, or the whole matrix, replaced
    norm           another weight, another bias
    block          a bottleneck beside an attention or a feed-forward block
    experts        a low-rank addition to each expert's weight
    virtual tokens rows that stand before the prompt; or, as a prefix, their keys and values

Running example: rank 16 on `model.layers.0.self_attn.q_proj` of a base with hidden size 512
    down = A            [16, 512]
    up   = scaling * B  [512, 16]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

Activation = Literal["relu", "gelu", "gelu_new", "silu", "tanh", "sigmoid", "leakyrelu", "linear"]


@dataclass(frozen=True, slots=True)
class LinearDelta:
    """A low-rank addition to the output of one linear module (or of one block, see `Bottleneck`).

    Semantics:
        y += up @ (down @ x')
    """

    down: torch.Tensor  # [rank, in_features], any float dtype, host
    up: torch.Tensor  # [out_features, rank], the scaling (and the site's gain, if any) folded in, host

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class SiteChange:
    """Whatever else changes at one linear module. `base(x)` includes the module's bias.

    Semantics, each line only where the part exists:
        x' = input_gain * x
        x'[block] = x'[block] @ rotation[block]                            blocks of equal size, in order
        z  = replacement @ x' + base bias    instead of    z = base(x')
        z  = gain * z
        z  = cos * z + sin * turned(z),  turned(z)[i] = -z[i + half], turned(z)[i + half] = z[i] in each group of
             `turn_group` outputs, half = turn_group // 2
        y  = z + dense @ x' + kron(left, right) @ x' + shift
    """

    gain: torch.Tensor | None = None  # [out_features]
    shift: torch.Tensor | None = None  # [out_features]
    input_gain: torch.Tensor | None = None  # [in_features]
    rotation: torch.Tensor | None = None  # [blocks, size, size], blocks * size = in_features
    cos: torch.Tensor | None = None  # [out_features]
    sin: torch.Tensor | None = None  # [out_features]
    turn_group: int = 0  # outputs
    dense: torch.Tensor | None = None  # [out_features, in_features]
    replacement: torch.Tensor | None = None  # [out_features, in_features]
    kron_left: torch.Tensor | None = None  # [o1, i1], the scaling folded in
    kron_right: torch.Tensor | None = None  # [o2, i2], o1 * o2 = out_features, i1 * i2 = in_features


@dataclass(frozen=True, slots=True)
class EmbeddingChange:
    """What changes at an embedding table; `scale` is the module's own factor on its rows (Gemma), else 1.

    Semantics, for token t:
        row(t) = rows[i] if token_ids[i] == t, else replacement[t] if there is one, else the base's row
        e(t)   = scale * gain * (row(t) + up @ down[:, t])
    """

    down: torch.Tensor | None = None  # [rank, vocabulary of the adapter]
    up: torch.Tensor | None = None  # [width, rank], the scaling folded in
    gain: torch.Tensor | None = None  # [width]
    token_ids: tuple[int, ...] = ()
    rows: torch.Tensor | None = None  # [len(token_ids), width], absolute values
    replacement: torch.Tensor | None = None  # [vocabulary of the adapter, width]


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Single rows of the head's matrix replaced: logit[token_ids[i]] = rows[i] @ x (plus the base's bias)."""

    token_ids: tuple[int, ...]
    rows: torch.Tensor  # [len(token_ids), in_features]


@dataclass(frozen=True, slots=True)
class NormWeights:
    """A norm module with other parameters, in the module's own convention (Gemma stores weight - 1)."""

    weight: torch.Tensor | None = None  # [width]
    bias: torch.Tensor | None = None  # [width]


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """A small network beside a block (Houlsby et al. 2019, Pfeiffer et al. 2020, He et al. 2022).

    Its matrices are the `LinearDelta` at the same path in `AdapterForms.linear`, with the down bias as the last
    column: down [width, hidden_size + 1], up [hidden_size, width] with the scaling folded in.

    Semantics, h the block's output, r the residual stream before the block's own norm:
        u = h, r or h + r, as `reads` says;    u = layer_norm(u) where norm_in_weight is given (or RMS, see below)
        a = up @ activation(down @ [u, 1]) + up_bias
        a = layer_norm(a)                   where norm_out_weight is given and norm_out_of is "a"
        h <- h + a + residual * r                                                  in general
        h <- layer_norm(h + a) + residual * r    where norm_out_weight is given and norm_out_of is "h + a"
    """

    activation: Activation
    reads: Literal["h", "r", "h + r"]
    residual: float = 0.0
    up_bias: torch.Tensor | None = None  # [hidden_size], the scaling folded in
    norm_in_weight: torch.Tensor | None = None  # [hidden_size]
    norm_in_bias: torch.Tensor | None = None  # [hidden_size]; with None the norm is RMS and the weight complete
    norm_in_epsilon: float = 1e-5
    norm_out_weight: torch.Tensor | None = None  # [hidden_size]
    norm_out_bias: torch.Tensor | None = None  # [hidden_size]
    norm_out_of: Literal["a", "h + a"] = "a"
    norm_out_epsilon: float = 1e-5


@dataclass(frozen=True, slots=True)
class ExpertDelta:
    """A low-rank addition to one stacked parameter of a mixture of experts.

    Semantics, for expert e:
        weight[e] += up[e] @ down[e]        weight[e] as [out_features, in_features]
    """

    down: torch.Tensor  # [experts, rank, in_features]
    up: torch.Tensor  # [experts, out_features, rank], the scaling folded in


@dataclass(frozen=True, slots=True)
class KVPrefix:
    """Keys and values of tokens before the prompt, as attention reads them: rotated, normalised, everything done."""

    keys: torch.Tensor  # [layers, tokens, kv_heads, head_dim]
    values: torch.Tensor  # [layers, tokens, kv_heads, head_dim]
    first_position: int  # of the first real token: `tokens` in PEFT, 0 in AdapterHub

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True, slots=True)
class VirtualTokens:
    """Input embeddings of tokens before the prompt, one set a task (one set where there are no tasks).

    They are what the first layer reads: no embedding scale is applied to them.
    """

    rows: torch.Tensor  # [tasks, tokens, hidden_size]
    has_tasks: bool = False  # the request must then name its task

    @property
    def num_tokens(self) -> int:
        return self.rows.shape[1]


@dataclass(frozen=True, slots=True)
class AdapterForms:
    """All forms of one adapter, keyed by the path of the base model's module."""

    linear: Mapping[str, LinearDelta] = field(default_factory=dict)  # linear sites, the head, and blocks
    changes: Mapping[str, SiteChange] = field(default_factory=dict)  # linear sites and the head
    embeddings: Mapping[str, EmbeddingChange] = field(default_factory=dict)
    head_rows: Mapping[str, HeadRows] = field(default_factory=dict)  # by the head's path
    norms: Mapping[str, NormWeights] = field(default_factory=dict)
    bottlenecks: Mapping[str, Bottleneck] = field(default_factory=dict)  # by the block's path
    experts: Mapping[str, ExpertDelta] = field(default_factory=dict)  # by module path + "." + parameter
    prefix: KVPrefix | None = None
    virtual: VirtualTokens | None = None
    invocation_tokens: tuple[int, ...] = ()  # active from the start of their last occurrence in the prompt; (): always
    vocab_size: int | None = None  # of the adapter's tables, where it is larger than the base's
