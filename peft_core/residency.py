"""Adapters that are resident on one device: one pool of bytes and a table of descriptors.

The engine decides *which* adapter sits *where* (a slot and a byte offset in the pool); this
module knows what those bytes mean. A resident adapter is an extent of the pool and one row
in each descriptor array; nothing is copied per step, whatever the mix of ranks.

        pool (uint8)   | ... | image of slot 0 | ... | image of slot 3 | KV blocks ...
        down_row[slot, group]   first row of the down tiles in pool.view(-1, 16)
        tiles[slot, group]      how many tiles, 0: this adapter does nothing there
        up_row[slot, part]      first row of the up tiles in pool.view(-1, up_tile)
        rank[slot, part]        exact rank, 0: this adapter does nothing there

Forms other than the low-rank one are views of the image, kept by slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from peft_core.errors import MalformedAdapter
from peft_core.forms import AdapterForms, KVPrefix, LinearDelta
from peft_core.image import DTYPES, IMAGE_ALIGNMENT_BYTES, site_views
from peft_core.parts import extents, read_parts
from peft_core.sites import DOWN_TILE, SiteGroup

Table = npt.NDArray[np.int64]


class Residency:
    """Descriptors of all resident adapters of one device.

    Changed by `bind` and `free` only, never by a step. `epochs[slot]` changes whenever the slot's
    meaning does, so that anything derived from descriptors can tell that it is stale.
    """

    def __init__(self, pool: torch.Tensor, groups: Sequence[SiteGroup], tile: int, dtype: str) -> None:
        """`pool`: [num_bytes] uint8 on the device, of a whole number of 256-byte rows."""
        assert pool.numel() % IMAGE_ALIGNMENT_BYTES == 0, "the pool must be whole rows of every table"
        self.groups = tuple(groups)
        self.tile = tile
        self.dtype_name = dtype
        self.dtype = DTYPES[dtype]
        self.elements = pool.view(self.dtype)  # [num_elements]
        self.down_table = self.elements.view(-1, DOWN_TILE)
        self.up_table = self.elements.view(-1, tile)
        self.group_index = {group.leader: index for index, group in enumerate(self.groups)}
        parts = [len(group.paths) for group in self.groups]
        self.first_part = np.concatenate([[0], np.cumsum(parts)])[:-1]  # [groups]
        self.tiles: Table = np.zeros((0, len(parts)), np.int64)  # [slots, groups]
        self.down_row: Table = np.zeros((0, len(parts)), np.int64)  # [slots, groups]
        self.rank: Table = np.zeros((0, sum(parts)), np.int64)  # [slots, parts]
        self.up_row: Table = np.zeros((0, sum(parts)), np.int64)  # [slots, parts]
        self.epochs: Table = np.zeros(0, np.int64)  # [slots]
        self.has_parts: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)  # [slots] whether there is more than low rank
        self._parts: dict[int, AdapterForms] = {}
        self._sites: dict[int, dict[str, tuple[dict[str, Any], int]]] = {}
        self._num_bytes: dict[int, int] = {}

    @property
    def num_slots(self) -> int:
        return len(self.tiles)

    @property
    def num_resident(self) -> int:
        return len(self._num_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all resident images (a step's adapters are a subset)."""
        return sum(self._num_bytes.values())

    def bind(self, slot: int, header: Mapping[str, Any], offset_bytes: int) -> None:
        """Give the image at `offset_bytes` of the pool the number `slot`.

        Raises:
            MalformedAdapter: the image was packed for another base, dtype or tiling, or is damaged; nothing is changed.
        """
        assert slot not in self._num_bytes, f"slot {slot} is taken"
        assert offset_bytes % IMAGE_ALIGNMENT_BYTES == 0
        self._check(header)
        self._grow(slot + 1)
        base = offset_bytes // self.dtype.itemsize
        sites = {}
        for site in header["sites"]:
            index = self.group_index[site["leader"]]
            parts = slice(self.first_part[index], self.first_part[index] + len(site["ranks"]))
            self.tiles[slot, index] = site["tiles"]
            self.down_row[slot, index] = (base + site["down"]) // DOWN_TILE
            self.rank[slot, parts] = site["ranks"]
            self.up_row[slot, parts] = (base + np.asarray(site["ups"])) // self.tile
            sites[site["leader"]] = (site, base)
        self._sites[slot] = sites
        if header["parts"]:
            self._parts[slot] = read_parts(header, self.elements[base:])
            self.has_parts[slot] = True
        self._num_bytes[slot] = header["num_bytes"]
        self.epochs[slot] += 1

    def free(self, slot: int) -> None:
        """Forget the slot; its bytes belong to the caller again."""
        del self._num_bytes[slot], self._sites[slot]
        self._parts.pop(slot, None)
        self.has_parts[slot] = False
        for table in (self.tiles, self.down_row, self.rank, self.up_row):
            table[slot] = 0
        self.epochs[slot] += 1

    def view(self, slot: int, group: SiteGroup) -> dict[str, LinearDelta]:
        """The matrices of one adapter at one group, copied out of the tiles; empty where it does nothing."""
        entry = self._sites[slot].get(group.leader)
        if entry is None:
            return {}
        site, base = entry
        return site_views(site, group, self.elements[base:], self.tile)

    def parts(self, slot: int) -> AdapterForms:
        """Everything but the low-rank form of one adapter, as views of the pool; `has_parts`: whether there is any."""
        return self._parts[slot]

    def prefix(self, slot: int) -> KVPrefix | None:
        """Keys and values of the tokens before the prompt, if the adapter brings them."""
        parts = self._parts.get(slot)
        return None if parts is None else parts.prefix

    def _check(self, header: Mapping[str, Any]) -> None:
        for name, ours in (("dtype", self.dtype_name), ("up_tile", self.tile)):
            if header[name] != ours:
                raise MalformedAdapter(
                    f"the adapter image was packed with {name} {header[name]}, this engine runs {ours}. Pack it again."
                )
        num_elements = header["num_bytes"] // self.dtype.itemsize
        for site in header["sites"]:
            index = self.group_index.get(site["leader"])
            if index is None:
                raise MalformedAdapter(f"the adapter image changes {site['leader']}, which this base does not have.")
            if not self._fits(site, self.groups[index], num_elements):
                raise MalformedAdapter(
                    f"the adapter image's part for {site['leader']} does not have this base's sizes, or reaches beyond "
                    "the image: it is damaged, or was packed for another base. Pack it again."
                )
        for first, size in extents(header):
            if not 0 <= first <= num_elements - size:
                raise MalformedAdapter(
                    "a part of the adapter image reaches beyond the image: it is damaged. Pack it again."
                )

    def _fits(self, site: Mapping[str, Any], group: SiteGroup, num_elements: int) -> bool:
        """Whether every row that the site's descriptors lead to lies within the image."""
        tiles, ranks, ups = site["tiles"], site["ranks"], site["ups"]
        if not len(ranks) == len(ups) == len(group.paths) or min(ranks) < 0 or tiles != -(-sum(ranks) // DOWN_TILE):
            return False
        parts = [(site["down"], tiles * group.in_features * DOWN_TILE, DOWN_TILE)]
        for out, rank, up in zip(group.out_features, ranks, ups, strict=True):
            parts.append((up, -(-out // self.tile) * rank * self.tile, self.tile))
        return all(0 <= first <= num_elements - size and first % row == 0 for first, size, row in parts)

    def _grow(self, num_slots: int) -> None:
        if num_slots <= self.num_slots:
            return
        more = max(num_slots, 2 * self.num_slots, 16) - self.num_slots
        self.tiles, self.down_row, self.rank, self.up_row = (
            np.pad(table, ((0, more), (0, 0))) for table in (self.tiles, self.down_row, self.rank, self.up_row)
        )
        self.epochs = np.pad(self.epochs, (0, more))
        self.has_parts = np.pad(self.has_parts, (0, more))
