"""How AdapterHub's library sees the layers of each architecture that it knows.

Some architectures it rewrites ("native"), others it hooks. The difference is visible: a hooked bottleneck acts on the
block's output before the model's own norm and residual addition, a native one replaces the addition; and "intermediate"
and "output" of a feed-forward block mean other linears in Llama and Mistral than elsewhere.

Running example: LAYOUTS["llama"]
    layer 2           model.layers.2
    attention block   model.layers.2.self_attn
    "intermediate"    model.layers.2.mlp.down_proj       (sic)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Place = Literal["attention_adapters", "output_adapters"]  # as tensors are named
# What a feed-forward bottleneck takes for the residual stream: what the block's norm reads; nothing; or the stream with
# the attention's output, which another block has computed, where the two stand side by side.
Residual = Literal["own", "none", "after attention"]
PLACES: tuple[Place, ...] = ("attention_adapters", "output_adapters")


@dataclass(frozen=True, slots=True)
class Layout:
    layers: str  # path of the list of layers
    attention: str  # the following are paths in a layer
    feed_forward: str
    linears: Mapping[str, str]  # "q", "k", "v", "intermediate", "output" -> the linear
    is_hooked: bool = False
    norms: Mapping[Place, str] | None = None  # that a hooked bottleneck applies to what it reads: see `norm_of`
    feed_forward_residual: Residual = "own"
    merges_attention: bool = False  # q, k and v are thirds of one linear

    def layer(self, number: int) -> str:
        return f"{self.layers}.{number}"

    def block(self, number: int, place: Place) -> str:
        inner = self.attention if place == "attention_adapters" else self.feed_forward
        return f"{self.layer(number)}.{inner}"

    def norm_of(self, place: Place, num_layers: int) -> str | None:
        """The base's norm that a bottleneck in any layer applies.

        It is the last layer's everywhere: the library looks the norm up when it is called, by the variable of a loop
        that has ended by then. Adapters are trained with that.
        """
        return None if self.norms is None else f"{self.layer(num_layers - 1)}.{self.norms[place]}"


def _attention(parent: str) -> dict[str, str]:
    return {key: f"{parent}.{key}_proj" for key in "qkv"}


_SWAPPED = Layout(
    "model.layers",
    "self_attn",
    "mlp",
    _attention("self_attn") | {"intermediate": "mlp.down_proj", "output": "mlp.up_proj"},
)
_GATED = _attention("self_attn") | {"intermediate": "mlp.up_proj", "output": "mlp.down_proj"}
_HOOKED = Layout("model.layers", "self_attn", "mlp", _GATED, is_hooked=True)
_NORMED = Layout(
    "model.layers",
    "self_attn",
    "mlp",
    _GATED,
    is_hooked=True,
    norms={"attention_adapters": "post_attention_layernorm", "output_adapters": "post_feedforward_layernorm"},
)
_GPT2 = Layout(
    "transformer.h",
    "attn",
    "mlp",
    dict.fromkeys("qkv", "attn.c_attn") | {"intermediate": "mlp.c_fc", "output": "mlp.c_proj"},
    merges_attention=True,
)
_GPTJ = Layout(
    "transformer.h",
    "attn",
    "mlp",
    _attention("attn") | {"intermediate": "mlp.fc_in", "output": "mlp.fc_out"},
    feed_forward_residual="after attention",
)
_PHI = Layout(
    "model.layers",
    "self_attn",
    "mlp",
    _attention("self_attn") | {"intermediate": "mlp.fc1", "output": "mlp.fc2"},
    is_hooked=True,
    feed_forward_residual="none",
)

LAYOUTS: Mapping[str, Layout] = {
    "gemma2": _NORMED,
    "gemma3_text": _NORMED,
    "gpt2": _GPT2,
    "gptj": _GPTJ,
    "llama": _SWAPPED,
    "mistral": _SWAPPED,
    "phi": _PHI,
    "qwen2": _HOOKED,
    "qwen3": _HOOKED,
}
