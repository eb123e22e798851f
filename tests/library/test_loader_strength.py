"""Neutral numbers of every form are seen through; one that is not neutral is seen."""

from __future__ import annotations

import pytest
import torch

from peft_core.forms import (
    AdapterForms,
    Bottleneck,
    EmbeddingChange,
    ExpertDelta,
    HeadRows,
    KVPrefix,
    LinearDelta,
    NormWeights,
    SiteChange,
    VirtualTokens,
)
from server.loader.strength import changes_nothing

ZEROS, ONES, EYE = torch.zeros(4), torch.ones(4), torch.eye(2).repeat(2, 1, 1)
DOWN, UP = torch.ones(2, 4), torch.zeros(4, 2)
HALF = torch.tensor([[1.0, 0.0]] * 4)  # only the first rank has an up
NEUTRAL = SiteChange(
    gain=ONES, shift=ZEROS, input_gain=ONES, rotation=EYE, cos=ONES, sin=ZEROS, turn_group=2, dense=torch.zeros(4, 4)
)


@pytest.mark.parametrize(
    "forms",
    [
        AdapterForms(),
        AdapterForms(linear={"a": LinearDelta(DOWN, UP)}),
        AdapterForms(linear={"a": LinearDelta(torch.tensor([[0.0] * 4, [1.0] * 4]), HALF)}),
        AdapterForms(changes={"a": NEUTRAL}),
        AdapterForms(changes={"a": SiteChange(kron_left=torch.zeros(2, 2), kron_right=torch.ones(2, 2))}),
        AdapterForms(embeddings={"e": EmbeddingChange(down=DOWN, up=UP, gain=ONES)}),
        AdapterForms(linear={"m": LinearDelta(DOWN, UP)}, bottlenecks={"m": Bottleneck("relu", "h", up_bias=ZEROS)}),
        AdapterForms(experts={"x": ExpertDelta(torch.ones(2, 1, 4), torch.zeros(2, 4, 1))}),
    ],
)
def test_neutral_numbers_change_nothing(forms: AdapterForms) -> None:
    assert changes_nothing(forms)


@pytest.mark.parametrize(
    "forms",
    [
        AdapterForms(linear={"a": LinearDelta(DOWN, HALF)}),
        *(
            AdapterForms(changes={"a": change})
            for change in (SiteChange(gain=2 * ONES), SiteChange(shift=ONES), SiteChange(input_gain=2 * ONES))
        ),
        AdapterForms(changes={"a": SiteChange(cos=ZEROS, sin=ONES, turn_group=2)}),
        AdapterForms(changes={"a": SiteChange(rotation=-EYE)}),
        AdapterForms(changes={"a": SiteChange(dense=torch.ones(4, 4))}),
        AdapterForms(changes={"a": SiteChange(replacement=torch.zeros(4, 4))}),
        AdapterForms(changes={"a": SiteChange(kron_left=torch.ones(2, 2), kron_right=torch.ones(2, 2))}),
        AdapterForms(embeddings={"e": EmbeddingChange(gain=2 * ONES)}),
        AdapterForms(embeddings={"e": EmbeddingChange(token_ids=(1,), rows=torch.zeros(1, 4))}),
        AdapterForms(head_rows={"h": HeadRows((1,), torch.zeros(1, 4))}),
        AdapterForms(norms={"n": NormWeights(weight=ONES)}),
        AdapterForms(linear={"m": LinearDelta(DOWN, UP)}, bottlenecks={"m": Bottleneck("relu", "h", up_bias=ONES)}),
        AdapterForms(linear={"m": LinearDelta(DOWN, UP)}, bottlenecks={"m": Bottleneck("relu", "r", residual=1.0)}),
        AdapterForms(experts={"x": ExpertDelta(torch.ones(2, 1, 4), torch.ones(2, 4, 1))}),
        AdapterForms(prefix=KVPrefix(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 2)),
        AdapterForms(virtual=VirtualTokens(torch.zeros(1, 2, 4))),
    ],
)
def test_what_changes_something_is_seen(forms: AdapterForms) -> None:
    assert not changes_nothing(forms)
