"""The base's product on CPU: the module's own numbers, and a row's bits whatever the number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from peft_core.kernels.base_product import PackedProduct, base_product

NUMS_ROWS = (1, 2, 3, 7, 8, 17, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_features", [64, 1024, 1536, 4100])
def test_a_row_has_the_same_bits_whatever_the_number_of_rows(in_features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    product = base_product([nn.Linear(in_features, 96, dtype=dtype)])
    if not isinstance(product, PackedProduct):
        pytest.skip("this machine packs no weights")
    x = torch.randn(64, in_features).to(dtype)
    whole = product(x)
    for num_rows in NUMS_ROWS:
        assert torch.equal(product(x[:num_rows]), whole[:num_rows])
        assert torch.equal(product(x[-num_rows:]), whole[-num_rows:])


def test_a_plain_product_is_not_so_steady() -> None:
    """The control: what the packed weights and the doubled single row are for."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 1536), torch.randn(64, 1536)
    whole = linear(x, weight)
    assert not all(torch.equal(linear(x[:num_rows], weight), whole[:num_rows]) for num_rows in NUMS_ROWS)


def test_a_group_is_its_members_side_by_side_and_gives_their_weights_back() -> None:
    torch.manual_seed(0)
    modules = [nn.Linear(64, 32), nn.Linear(64, 16, bias=False)]
    product = base_product(modules)
    x = torch.randn(5, 64)
    assert torch.allclose(product(x), torch.cat([module(x) for module in modules], -1), atol=1e-5)
    for index, module in enumerate(modules):
        assert torch.equal(product.weight(index), module.weight)
    assert product.bias(1) is None
