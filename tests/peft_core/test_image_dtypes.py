"""Every form keeps its numbers in the image, in whatever dtype the engine runs."""

from __future__ import annotations

import pytest
import torch

from peft_core.errors import MalformedAdapter
from peft_core.forms import AdapterForms, LinearDelta, SiteChange, VirtualTokens
from peft_core.image import DTYPES, pack, unpack
from peft_core.spec import BaseModelSpec
from tests.tiny_models import make_model

PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def spec() -> BaseModelSpec:
    return BaseModelSpec.from_model(make_model("llama"), "test")


def forms(spec: BaseModelSpec, value: float = 1.5) -> AdapterForms:
    """A low-rank addition, a gain and virtual tokens, in float32 as decoders make them."""
    site = spec.sites[PATH]
    delta = LinearDelta(torch.randn(3, site.in_features), torch.randn(site.out_features, 3))
    gain = torch.full((site.out_features,), value)
    return AdapterForms({PATH: delta}, {PATH: SiteChange(gain=gain)}, virtual=VirtualTokens(torch.randn(1, 5, 16)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_comes_back_rounded_to_the_dtype(spec: BaseModelSpec, dtype: str) -> None:
    packed = forms(spec)
    image = pack(packed, spec, dtype)
    assert image.payload.dtype == DTYPES[dtype]
    found = unpack(image, spec)
    assert packed.virtual is not None
    assert found.virtual is not None
    assert torch.equal(found.linear[PATH].down, packed.linear[PATH].down.to(DTYPES[dtype]))
    assert torch.equal(found.changes[PATH].gain, packed.changes[PATH].gain.to(DTYPES[dtype]))  # type: ignore[arg-type, union-attr]
    assert torch.equal(found.virtual.rows, packed.virtual.rows.to(DTYPES[dtype]))


def test_a_number_that_the_dtype_cannot_hold_is_refused(spec: BaseModelSpec) -> None:
    pack(forms(spec, 1e6), spec, "bfloat16")
    with pytest.raises(MalformedAdapter, match=r"q_proj\.gain is not finite in torch\.float16"):
        pack(forms(spec, 1e6), spec, "float16")
