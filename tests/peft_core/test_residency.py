"""What a slot means: only what was bound last, and only what lies within its image."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from peft_core.errors import MalformedAdapter
from peft_core.forms import AdapterForms, LinearDelta
from peft_core.image import Image, pack
from peft_core.residency import Residency
from peft_core.sites import site_groups, up_tile
from peft_core.spec import BaseModelSpec, Site

WIDTHS = {"q": (48, 64), "k": (48, 32), "o": (64, 48)}


def make_spec(widths: dict[str, tuple[int, int]]) -> BaseModelSpec:
    sites = {path: Site(path, "linear", *size, has_bias=False, transposed=False) for path, size in widths.items()}
    plain: dict[str, Any] = {
        "model_type": "t", "hidden_size": 48, "num_layers": 1, "vocab_size": 101, "max_position": 64,
        "tie_word_embeddings": False, "fingerprint": "f", "other_modules": (), "input_groups": (("q", "k"),),
    }  # fmt: skip
    return BaseModelSpec(sites=sites, **plain)


SPEC = make_spec(WIDTHS)


def make_image(paths: str, spec: BaseModelSpec = SPEC, rank: int = 3) -> Image:
    linear = {}
    for path in paths:
        site = spec.sites[path]
        linear[path] = LinearDelta(torch.randn(rank, site.in_features), torch.randn(site.out_features, rank))
    return pack(AdapterForms(linear), spec, "float32")


@pytest.fixture
def residency() -> Residency:
    return Residency(torch.zeros(1 << 16, dtype=torch.uint8), site_groups(SPEC), up_tile(SPEC), "float32")


def damaged(image: Image, site: int, **values: Any) -> dict[str, Any]:
    header = copy.deepcopy(image.header)
    header["sites"][site].update(values)
    return header


@pytest.mark.parametrize(
    "values",
    [
        {"down": 1 << 40},
        {"down": -16},
        {"down": 8},
        {"ups": [1 << 40]},
        {"ups": [0, 0]},
        {"ranks": [300]},
        {"ranks": [-3]},
        {"ranks": [3, 3]},
        {"tiles": 2},
    ],
)
def test_a_part_that_does_not_lie_within_its_image_is_refused(residency: Residency, values: dict[str, Any]) -> None:
    image = make_image("qo")
    with pytest.raises(MalformedAdapter, match="part for o"):
        residency.bind(0, damaged(image, 1, **values), 0)
    residency.bind(0, image.header, 0)  # undamaged, it is welcome


def test_a_refused_image_leaves_nothing_behind_in_its_slot(residency: Residency) -> None:
    with pytest.raises(MalformedAdapter):
        residency.bind(0, damaged(make_image("qo"), 1, down=1 << 40), 0)
    residency.bind(0, make_image("o").header, 0)
    q, o = (residency.group_index[leader] for leader in "qo")
    assert residency.tiles[0, q] == 0
    assert residency.tiles[0, o] == 1


def test_an_image_of_a_base_with_the_same_names_and_smaller_sizes_is_refused(residency: Residency) -> None:
    smaller = make_spec({**WIDTHS, "o": (16, 16)})
    residency.bind(0, make_image("q", smaller).header, 0)
    with pytest.raises(MalformedAdapter, match="another base"):
        residency.bind(1, make_image("o", smaller).header, 0)
