"""What is easily misread in AdapterHub's files: each misreading is tried, and is seen to be wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from peft_core.forms import AdapterForms, LinearDelta, SiteChange
from peft_core.methods import decode
from tests.adapterhub_goldens import golden_model, golden_spec, read_golden
from tests.peft_core.test_adapterhub_parity import TOLERANCE, error, forms_of
from tests.tiny_engine import ModelWeights

WRONG = 100 * TOLERANCE
Misreading = Callable[[AdapterForms], AdapterForms]


def given(values: torch.Tensor | None) -> torch.Tensor:
    assert values is not None
    return values


def every_bottleneck(**values: object) -> Misreading:
    """All bottlenecks with other values."""

    def misread(forms: AdapterForms) -> AdapterForms:
        changed = {path: replace(one, **values) for path, one in forms.bottlenecks.items()}  # type: ignore[arg-type]
        return replace(forms, bottlenecks=changed)

    return misread


def up_divided_by(number: float) -> Misreading:
    def misread(forms: AdapterForms) -> AdapterForms:
        linear = {path: LinearDelta(delta.down, delta.up / number) for path, delta in forms.linear.items()}
        changed = {path: replace(one, up_bias=given(one.up_bias) / number) for path, one in forms.bottlenecks.items()}
        return replace(forms, linear=linear, bottlenecks=changed)

    return misread


def without_up_biases(forms: AdapterForms) -> AdapterForms:
    return every_bottleneck(up_bias=None)(forms)


def without_down_biases(forms: AdapterForms) -> AdapterForms:
    linear = {
        path: LinearDelta(torch.cat([delta.down[:, :-1], torch.zeros(delta.rank, 1)], dim=1), delta.up)
        for path, delta in forms.linear.items()
    }
    return replace(forms, linear=linear)


def norm_of_the_own_layer(forms: AdapterForms) -> AdapterForms:
    base = ModelWeights(golden_model("gemma2"))
    changed = {
        path: replace(one, norm_in_weight=1 + base.weight(path.replace("mlp", "post_feedforward_layernorm")))
        for path, one in forms.bottlenecks.items()
    }
    return replace(forms, bottlenecks=changed)


def norm_weight_as_stored(forms: AdapterForms) -> AdapterForms:
    changed = {
        path: replace(one, norm_in_weight=given(one.norm_in_weight) - 1) for path, one in forms.bottlenecks.items()
    }
    return replace(forms, bottlenecks=changed)


def without_up_proj(forms: AdapterForms) -> AdapterForms:
    changes = {path: change for path, change in forms.changes.items() if not path.endswith("up_proj")}
    return replace(forms, changes=changes)


def bias_outside_the_gain(forms: AdapterForms) -> AdapterForms:
    """DoRA as PEFT understands it."""
    base = ModelWeights(golden_model("qwen2"))
    changes = {}
    for path, change in forms.changes.items():
        bias = base.bias(path)
        assert change.gain is not None
        changes[path] = change if bias is None else replace(change, shift=(1 - change.gain) * bias)
    return replace(forms, changes=changes)


def scaling_in_the_norm(forms: AdapterForms) -> AdapterForms:
    """DoRA's norm of W + s B A, as PEFT takes it; alpha / r is 3 in the golden."""
    base = ModelWeights(golden_model("llama"))
    linear, changes = {}, {}
    for path, delta in forms.linear.items():
        gain = forms.changes[path].gain
        assert gain is not None
        scaled = delta.up / gain[:, None]  # s B
        weight = base.weight(path)
        lengths = [torch.linalg.vector_norm(weight + scaled @ delta.down / by, dim=1) for by in (3, 1)]
        other = gain * lengths[0] / lengths[1]
        linear[path] = LinearDelta(delta.down, other[:, None] * scaled)
        changes[path] = SiteChange(gain=other)
    return replace(forms, linear=linear, changes=changes)


def thirds_moved(forms: AdapterForms) -> AdapterForms:
    """q and v of a merged linear taken for q and k."""
    linear = {path: LinearDelta(delta.down, delta.up[_moved(len(delta.up))]) for path, delta in forms.linear.items()}
    return replace(forms, linear=linear)


def _moved(num_rows: int) -> torch.Tensor:
    q, k, v = torch.arange(num_rows).chunk(3)
    return torch.cat([q, v, k])


MISREADINGS: list[tuple[str, str, str, Misreading]] = [
    ("seq_bn reads h + r, not h", "llama", "seq_bn", every_bottleneck(reads="h")),
    ("double_seq_bn reads h, not h + r", "llama", "double_seq_bn", every_bottleneck(reads="h + r")),
    ("par_bn reads the stream", "llama", "par_bn", every_bottleneck(reads="h")),
    ("par_bn is scaled by 4", "llama", "par_bn", up_divided_by(4.0)),
    ("the up bias is scaled, and there", "llama", "par_bn", without_up_biases),
    ("the down bias is there", "gpt2", "seq_bn", without_down_biases),
    ("residual_before_ln off counts r twice", "llama", "counted_twice", every_bottleneck(residual=0.0)),
    ("it does in hooked bases, too", "qwen2", "counted_twice", every_bottleneck(residual=0.0)),
    ("original_ln_after off leaves r out", "gpt2", "no_original", every_bottleneck(residual=0.0)),
    ("AdapterPlus leaves it out and counts it twice", "llama", "adapter_plus", every_bottleneck(residual=-1.0)),
    ("the norm is of a alone", "llama", "ln_after", every_bottleneck(norm_out_of="h + a")),
    ("the norm is of h + a", "llama", "ln_after_residual", every_bottleneck(norm_out_of="a")),
    ("a norm stands before", "llama", "ln_before", every_bottleneck(norm_in_weight=None, norm_in_bias=None)),
    ("gemma's norm is the last layer's", "gemma2", "seq_bn", norm_of_the_own_layer),
    ("gemma's weight is completed by 1", "gemma2", "seq_bn", norm_weight_as_stored),
    ("gemma's norm is there", "gemma3", "seq_bn", every_bottleneck(norm_in_weight=None)),
    ("the bias is in DoRA's gain", "qwen2", "dora", bias_outside_the_gain),
    ("alpha is not in DoRA's norm", "llama", "dora", scaling_in_the_norm),
    ("the middle third is k", "gpt2", "lora", thirds_moved),
    ("up_proj is scaled in IA3", "llama", "ia3", without_up_proj),
]


@pytest.mark.parametrize(
    ("base", "name", "misread"), [row[1:] for row in MISREADINGS], ids=[row[0] for row in MISREADINGS]
)
def test_another_reading_is_wrong(base: str, name: str, misread: Misreading) -> None:
    golden = read_golden(base, name)
    forms = forms_of(golden)
    assert error(golden, forms) <= TOLERANCE
    assert error(golden, misread(forms)) > WRONG


def test_ia3_scales_outputs_everywhere() -> None:
    changes = forms_of(read_golden("llama", "ia3")).changes
    down = changes["model.layers.0.mlp.down_proj"]
    assert down.gain is not None
    assert len(down.gain) == golden_spec("llama").hidden_size
    assert all(change.input_gain is None for change in changes.values())


def test_intermediate_and_output_are_swapped_in_llama_only() -> None:
    for base, path in (("llama", "mlp.down_proj"), ("qwen2", "mlp.up_proj")):
        assert any(site.endswith(path) for site in forms_of(read_golden(base, "ia3_alpha")).changes)
        other = "mlp.up_proj" if path == "mlp.down_proj" else "mlp.down_proj"
        assert not any(site.endswith(other) for site in forms_of(read_golden(base, "ia3_alpha")).changes)


def test_alpha_scales_the_thirds_that_ia3_leaves_alone() -> None:
    gain = forms_of(read_golden("gpt2", "ia3_alpha")).changes["transformer.h.0.attn.c_attn"].gain
    assert gain is not None
    third = len(gain) // 3
    assert torch.equal(gain[third:], torch.full((2 * third,), 2.0))


def test_the_gpt2_lora_leaves_the_middle_third_alone() -> None:
    delta = forms_of(read_golden("gpt2", "lora")).linear["transformer.h.0.attn.c_attn"]
    q, k, v = delta.up.chunk(3)
    assert delta.rank == 8
    assert not k.any()
    assert not q[:, 4:].any()
    assert not v[:, :4].any()


def test_a_prefix_begins_at_position_0_and_is_not_behind_the_prompt() -> None:
    prefix = forms_of(read_golden("llama", "prefix")).prefix
    assert prefix is not None
    assert (prefix.first_position, prefix.num_tokens) == (0, 5)
    assert tuple(prefix.keys.shape) == (3, 5, 2, 8)


def test_mix_and_match_is_a_prefix_and_bottlenecks_in_one() -> None:
    forms = forms_of(read_golden("llama", "mam"))
    assert forms.prefix is not None
    assert sorted(forms.bottlenecks) == [f"model.layers.{layer}.mlp" for layer in range(3)]
    assert forms.bottlenecks["model.layers.0.mlp"].reads == "r"


def test_the_file_without_the_first_part_of_its_paths_is_the_same_adapter() -> None:
    golden = read_golden("llama", "union")
    config, tensors = golden.files()
    tensors.tensors = {name.removeprefix("model."): value for name, value in tensors.tensors.items()}
    tensors.header = {name.removeprefix("model."): entry for name, entry in tensors.header.items()}
    base = ModelWeights(golden_model("llama"))
    assert error(golden, decode(config, tensors, golden_spec("llama"), base).forms) <= TOLERANCE
