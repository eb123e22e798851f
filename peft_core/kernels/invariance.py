"""Products in which a row has the same bits whatever the number of rows.

Libraries choose the order of a sum by the number of rows, when there are few. From `ROW_MULTIPLE` rows on they do not,
so fewer are padded with zeros.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, pad

ROW_MULTIPLE = 16


def padded_rows(x: torch.Tensor) -> torch.Tensor:
    """x [n, width] with zeros below it up to a multiple of `ROW_MULTIPLE`; itself where nothing is missing."""
    missing = -len(x) % ROW_MULTIPLE
    return pad(x, (0, 0, 0, missing)) if missing else x


def invariant_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias. x: [rows, in], weight: [out, in]."""
    return linear(padded_rows(x), weight, bias)[: len(x)]
