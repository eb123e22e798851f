"""Where adapters act: groups of linear modules that read the same input.

A group is computed as one product: the first member (the leader) multiplies the input by
the stacked weights of all members, the others hand out their columns of that result.
Adapters follow the same grouping: one low-rank product a group instead of one a module.

Running example: a Llama layer with hidden size 512, 8 heads and 2 key-value heads of 64
    SiteGroup(paths=(q_proj, k_proj, v_proj), in_features=512, out_features=(512, 128, 128))
    SiteGroup(paths=(o_proj,),                in_features=512, out_features=(512,))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from peft_core.spec import BaseModelSpec

DOWN_TILE = 16  # columns of a down tile: one 64-byte line of float32
MAX_UP_TILE = 64
MIN_UP_TILE = 8


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Linear modules of one parent that read the same tensor, in call order."""

    paths: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    is_head: bool = False  # its rows are the step's last rows, not its token rows
    is_block: bool = False  # no module of the base, but the place of a bottleneck; its last input is always 1

    @property
    def leader(self) -> str:
        return self.paths[0]

    @property
    def columns(self) -> tuple[tuple[int, int], ...]:
        """Column range of each member in the group's output [rows, sum(out_features)]."""
        ends = list(accumulate(self.out_features))
        return tuple(zip([0, *ends[:-1]], ends, strict=True))


def site_groups(spec: BaseModelSpec) -> tuple[SiteGroup, ...]:
    """All adaptable linear sites of the base, each in exactly one group, in the model's order; then its blocks."""
    linear = {path: site for path, site in spec.sites.items() if site.kind in ("linear", "head")}
    grouped = {path: group for group in spec.input_groups for path in group}
    groups: list[SiteGroup] = []
    done: set[str] = set()
    for path, site in linear.items():
        if path in done:
            continue
        paths = grouped.get(path, (path,))
        done.update(paths)
        outs = tuple(linear[member].out_features for member in paths)
        groups.append(SiteGroup(paths, site.in_features, outs, is_head=site.kind == "head"))
    blocks = (SiteGroup((b.path,), b.width + 1, (b.width,), is_block=True) for b in spec.blocks.values())
    return (*groups, *blocks)


def up_tile(spec: BaseModelSpec) -> int:
    """Columns of an up tile: the largest power of two that divides every inner site's width.

    A narrower site than `MIN_UP_TILE` allows is padded to whole tiles, and so is the LM head, whose
    width (the vocabulary) is often odd.
    """
    widths = [site.out_features for site in spec.sites.values() if site.kind == "linear"]
    common = math.gcd(*widths) if widths else MAX_UP_TILE
    return max(MIN_UP_TILE, min(MAX_UP_TILE, common & -common))
