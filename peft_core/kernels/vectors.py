"""Vectors of several adapters laid out row by row: a gain or a shift for every row that has one, in one operation.

Rows of few tokens share one table, gathered when the batch's members change, not in a step; a long chunk keeps its
adapter's one vector, which is broadcast over its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from peft_core.batch import SlotRows


class Vectors(NamedTuple):
    rows: slice | torch.Tensor  # of the step
    values: torch.Tensor  # [rows, width], or [1, width] for all of them


def vectors_by_row(
    parts: Iterable[SlotRows], vector_of: Callable[[int], torch.Tensor | None], device: torch.device
) -> tuple[Vectors, ...]:
    """`vector_of(slot)`: [width], or None where the adapter has none."""
    narrow: list[tuple[np.ndarray, torch.Tensor]] = []
    laid_out: list[Vectors] = []
    for part in parts:
        vector = vector_of(part.slot)
        if vector is None:
            continue
        if part.is_narrow:
            narrow.append((part.rows, vector))
        else:
            laid_out.append(Vectors(row_index(part.rows, device), vector[None]))
    if narrow:
        rows = np.concatenate([rows for rows, _ in narrow])
        owners = np.repeat(np.arange(len(narrow)), [len(rows) for rows, _ in narrow])
        order = np.argsort(rows, kind="stable")
        table = torch.stack([vector for _, vector in narrow])
        values = table.index_select(0, torch.from_numpy(owners[order]).to(device))
        laid_out.append(Vectors(row_index(rows[order], device), values))
    return tuple(laid_out)


def row_index(rows: np.ndarray, device: torch.device) -> slice | torch.Tensor:
    """Ascending rows as a slice where they follow one another, so that reading them copies nothing."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)


def multiply(y: torch.Tensor, vectors: Vectors) -> None:
    """y[rows] *= values, in place. y: [all rows, width]."""
    if isinstance(vectors.rows, slice):
        y[vectors.rows].mul_(vectors.values)
    else:
        y[vectors.rows] = y[vectors.rows] * vectors.values


def add(y: torch.Tensor, vectors: Vectors) -> None:
    """y[rows] += values, in place. y: [all rows, width]."""
    if isinstance(vectors.rows, slice):
        y[vectors.rows].add_(vectors.values)
    else:
        y[vectors.rows] = y[vectors.rows] + vectors.values
