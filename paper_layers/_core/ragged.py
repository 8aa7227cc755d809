"""Clouds of different sizes in one tensor, and where each of them starts."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from paper_layers._core import checks


def batch_starts(name: str, batch: Tensor, rows: Tensor, clouds: int | None = None) -> Tensor:
    """Convert PyG's `batch` (ascending, one cloud number for each row) to `ptr` (where each cloud starts)."""
    checks.shape(name, batch, (len(rows),))
    wrong = batch < torch.cat([batch.new_zeros(min(1, len(batch))), batch[:-1]])
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected numbers from 0 in ascending order, got {int(batch[first])} at position {first}"
        )
    if clouds is None:
        clouds = cloud_count(batch)
    return torch.searchsorted(batch, torch.arange(clouds + 1, device=rows.device))


def check_starts(name: str, ptr: Tensor, rows: int) -> list[int]:
    """Return `ptr` as a list, which must ascend from 0 to the number of rows; reads the data."""
    numbers = ptr.tolist()
    if not numbers:
        raise ValueError(f"{name}: expected shape (B + 1,), got (0,)")
    if (numbers[0], numbers[-1]) != (0, rows):
        raise ValueError(f"{name}: expected numbers from 0 to {rows}, got {numbers[0]} to {numbers[-1]}")
    if numbers != sorted(numbers):  # Quicker than a loop, as this runs before every layer.
        position = next(i for i, (before, number) in enumerate(itertools.pairwise(numbers), 1) if number < before)
        raise ValueError(f"{name}: expected numbers that never descend, got {numbers[position]} at position {position}")
    return numbers


def cloud_count(batch: Tensor) -> int:
    """Return the number of clouds in a sorted `batch`."""
    return int(batch[-1]) + 1 if len(batch) else 0
