"""From the stored tensors of one LoRA module to its form.

    factors     blocks are set on their diagonal, pooled columns spread over the inputs they average
    scaling     folded into the up side, with KaSA's diagonal
    start       what the initialisation took out of the base, as further ranks
    DoRA        gain = magnitude / norm of each row of W + up down; folded into the up side, not into the bias
                (https://arxiv.org/abs/2402.09353)

    Semantics of DoRA at a linear with bias b:
        y = gain * ((W + up down) x) + b  =  gain * base(x) + (gain * up) down x + (1 - gain) * b

At an embedding the norm is that of each channel over the whole vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from peft_core.errors import MalformedAdapter
from peft_core.forms import EmbeddingChange, LinearDelta, SiteChange
from peft_core.methods.base_weights import BaseWeights, require_base
from peft_core.methods.lora.config import LoraConfig
from peft_core.methods.lora.sites import LoraSite
from peft_core.methods.lora.starts import Removed, largest_components, orthogonal_part, smallest_components
from peft_core.methods.tensors import TensorSource, read_finite, require_finite
from peft_core.spec import Site

_CHUNK = 4096  # rows of a weight that are held at once beside it


class LinearForm(NamedTuple):
    delta: LinearDelta
    change: SiteChange | None


def read_linear(
    lora: LoraSite, config: LoraConfig, tensors: TensorSource, base: BaseWeights | None, *, keeps_base: bool
) -> LinearForm:
    """The form of one linear, or of the head.

    Args:
        keeps_base: the file has the weight that the initialisation left, so nothing must be taken out again.

    Raises:
        MalformedAdapter: a tensor holds NaN or infinity, or is not what the header announced.
        UnsupportedAdapter: the base's weights are needed and not at hand.
    """
    down, up = read_factors(lora, config, tensors)
    removed = None if keeps_base else _removed(lora, config, base)
    if removed is not None:
        down, up = torch.cat([down, removed.down]), torch.cat([up, -removed.up], dim=1)
    change = None
    if lora.magnitude is not None:
        gain, shift = _gain(lora, lora.magnitude, down, up, tensors, base)
        change, up = SiteChange(gain=gain, shift=shift), gain[:, None] * up
    if lora.bias is not None:
        change = SiteChange(shift=lora.scaling * read_finite(tensors, lora.bias))
    require_finite(up, lora.up)
    return _padded(lora.site, LinearForm(LinearDelta(down.contiguous(), up.contiguous()), change))


def read_embedding(lora: LoraSite, tensors: TensorSource, base: BaseWeights | None) -> EmbeddingChange:
    """The form of an embedding; `down` has a column for every row of the table. Raises as `read_linear`."""
    down, up = read_finite(tensors, lora.down), read_finite(tensors, lora.up) * lora.scaling
    require_finite(up, lora.up)
    gain = None
    if lora.magnitude is not None:
        table = require_base(base, "DoRA").weight(lora.site.path)
        squares = torch.zeros(table.shape[1])
        for first in range(0, table.shape[0], _CHUNK):
            rows = table[first : first + _CHUNK] + down[:, first : first + _CHUNK].T @ up.T
            squares += rows.square().sum(dim=0)
        gain = read_finite(tensors, lora.magnitude) / squares.sqrt()
        _require_norms(gain, lora.magnitude)
    missing = lora.site.in_features - down.shape[1]
    down = torch.nn.functional.pad(down, (0, missing)) if missing > 0 else down
    return EmbeddingChange(down=down.contiguous(), up=up, gain=gain)


def read_factors(lora: LoraSite, config: LoraConfig, tensors: TensorSource) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole factors: down [rank, in], up [out, rank] with the scaling and the diagonal folded in."""
    down, up = read_finite(tensors, lora.down), read_finite(tensors, lora.up)
    side = None if config.blocks is None else config.blocks.side(lora.site.path)
    if config.blocks is not None and side == "down":
        down = torch.block_diag(*down.chunk(config.blocks.num_blocks))
    if config.blocks is not None and side == "up":
        up = torch.block_diag(*up.chunk(config.blocks.num_blocks))
    if config.pool > 1:  # the mean of each group of inputs, times the number of groups
        num_groups = down.shape[1]
        down = down.repeat_interleave(config.pool, dim=1) * (num_groups / config.pool)
    up = up * lora.scaling
    if lora.diagonal is not None:
        up = up * read_finite(tensors, lora.diagonal)
    return down, up


def _padded(site: Site, form: LinearForm) -> LinearForm:
    """The form of a head that has fewer rows than the base's, with neutral values for those that it lacks."""
    missing = site.out_features - form.delta.up.shape[0]
    if missing <= 0:
        return form
    pad = torch.nn.functional.pad
    delta = LinearDelta(form.delta.down, pad(form.delta.up, (0, 0, 0, missing)))
    if form.change is None:
        return LinearForm(delta, None)
    gain, shift = form.change.gain, form.change.shift
    change = SiteChange(
        gain=None if gain is None else pad(gain, (0, missing), value=1.0),
        shift=None if shift is None else pad(shift, (0, missing)),
    )
    return LinearForm(delta, change)


def _removed(lora: LoraSite, config: LoraConfig, base: BaseWeights | None) -> Removed | None:
    if not config.changes_base:
        return None
    path, rank = lora.site.path, lora.rank
    if config.has_diagonal:
        return smallest_components(require_base(base, "KaSA").weight(path), rank)
    weight = require_base(base, f'An adapter with init_lora_weights="{config.start}"').weight(path)
    if config.start == "pissa":
        return largest_components(weight, rank)
    return orthogonal_part(weight, rank, lora.scaling, transposed=lora.site.transposed)


def _gain(
    lora: LoraSite,
    magnitude: str,
    down: torch.Tensor,
    up: torch.Tensor,
    tensors: TensorSource,
    base: BaseWeights | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(gain, shift) of DoRA; the shift keeps the bias out of the gain."""
    weights = require_base(base, "DoRA")
    weight = weights.weight(lora.site.path)
    norms = [
        (weight[first : first + _CHUNK] + up[first : first + _CHUNK] @ down).norm(dim=1)
        for first in range(0, weight.shape[0], _CHUNK)
    ]
    gain = read_finite(tensors, magnitude) / torch.cat(norms)
    _require_norms(gain, magnitude)
    return gain, bias_beside(gain, lora.site, weights)


def bias_beside(gain: torch.Tensor, site: Site, base: BaseWeights) -> torch.Tensor | None:
    """What is added so that a gain on the output leaves the module's own bias alone."""
    bias = base.bias(site.path) if site.has_bias else None
    return None if bias is None else (1 - gain) * bias


def _require_norms(gain: torch.Tensor, name: str) -> None:
    if not bool(torch.isfinite(gain).all()):
        raise MalformedAdapter(
            f'tensor "{name}" scales a weight of which a row or column is zero, so the result is not a number. '
            "Use the base that the adapter was trained on.",
            tensor=name,
        )
