"""The pool: one allocation for everything the device holds beyond the weights.

It is addressed in units; a unit is one K/V block of every layer (block-major), or a piece of an
adapter's image. Which unit is what is the block manager's business; here a unit is only bytes.

    unit u:  [layer 0: K[block_size] V[block_size]] [layer 1: K V] ...      a token row is num_kv_heads * head_dim

so in the table `rows` the K of token `offset` of unit u in layer l is row
    (u * num_layers * 2 + 2 * l) * block_size + offset,          its V is `block_size` rows further.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peft_core.image import IMAGE_ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class KVShape:
    """Sizes of one K/V block."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: torch.dtype

    @property
    def row_features(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def rows_per_unit(self) -> int:
        return self.num_layers * 2 * self.block_size

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit, a multiple of the alignment that adapter images need."""
        size = self.rows_per_unit * self.row_features * self.dtype.itemsize
        assert size % IMAGE_ALIGNMENT_BYTES == 0, "block_size 16 makes any real head a multiple of 256 bytes"
        return size


class KVCache:
    """The pool's tensors. `pool` is shared with the residency of adapters."""

    def __init__(self, shape: KVShape, num_units: int, device: torch.device) -> None:
        self.shape, self.num_units = shape, num_units
        self.pool = torch.empty(num_units * shape.unit_bytes, dtype=torch.uint8, device=device)  # [bytes]
        elements = self.pool.view(shape.dtype)
        self.rows = elements.view(-1, shape.row_features)  # [units * rows_per_unit, row_features]
        self.blocks = elements.view(-1, shape.block_size * shape.row_features)  # [units * num_layers * 2, ...]
        self.units = elements.view(num_units, -1)  # [units, elements of a unit]

    def clear(self, units: torch.Tensor) -> None:
        """Zero fresh units: what they held before may read as NaN, which no mask takes away."""
        self.units.index_fill_(0, units, 0)
