"""Clouds of different sizes in one tensor, and where each of them starts."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from paper_layers._core import checks


def batch_starts(name: str, batch: Tensor, rows: Tensor) -> Tensor:
    """Convert PyG's `batch` (ascending, one cloud number for each row) to `ptr` (where each cloud starts)."""
    return all_batch_starts((name, batch, rows))[0]


def all_batch_starts(*named: tuple[str, Tensor, Tensor]) -> list[Tensor]:
    """Convert several at once, each given as name, batch and rows, to starts of as many clouds as any of them has.

    Waits for the device once.
    """
    facts = []
    for name, batch, rows in named:
        checks.shape(name, batch, (len(rows),))
        if len(batch):
            facts += [(batch[1:] < batch[:-1]).any().long(), batch[0], batch[-1]]
    numbers = torch.stack(facts).tolist() if facts else []
    if any(numbers[0::3]) or min(numbers[1::3], default=0) < 0:
        for name, batch, _ in named:
            _check_ascending(name, batch)
    clouds = max(numbers[2::3], default=-1) + 1
    return [torch.searchsorted(batch, torch.arange(clouds + 1, device=batch.device)) for _, batch, _ in named]


def _check_ascending(name: str, batch: Tensor) -> None:
    wrong = batch < torch.cat([batch.new_zeros(min(1, len(batch))), batch[:-1]])
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected numbers from 0 in ascending order, got {int(batch[first])} at position {first}"
        )


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
