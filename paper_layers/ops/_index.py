"""Tables of neighbours that the ops share."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from paper_layers.ops._library import define, library
from paper_layers.ops._vmap import one_by_one


def check_rows(index: Tensor, rows: int) -> None:
    """Refuse what is neither a row nor -1, as the kernels do; reads the data."""
    wrong = (index < -1) | (index >= rows)
    if wrong.any():
        raise RuntimeError(f"index: expected -1 or a row below {rows}, got {int(index[wrong][0])}")


def _reference(index: Tensor, rows: int) -> Tensor:
    if index.numel() == 0:
        return index.new_empty(index.shape[0] * index.shape[1], index.shape[2])
    check_rows(index, rows)
    start = torch.arange(index.shape[0], device=index.device)[:, None, None] * rows
    return torch.where(index < 0, -1, index + start).flatten(0, 1)


def _fake(index: Tensor, rows: int) -> Tensor:
    return index.new_empty(index.shape[0] * index.shape[1], index.shape[2])


def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    (flat,), (dim,) = one_by_one(lambda *a: (flat_index(*a),), info.batch_size, in_dims, arguments)
    return flat, dim


_op = define("flat_index(Tensor index, SymInt rows) -> Tensor", _reference, _fake)
torch.library.register_vmap("paper_layers::flat_index", _vmap, lib=library)


def flat_index(index: Tensor, rows: int) -> Tensor:
    """Convert neighbours (B, M, k) within clouds of so many rows to neighbours (B M, k) in all rows; -1 stays.

    An index outside its own cloud is an error: it must not be taken for a row of the next one.
    """
    flat: Tensor = _op(index, rows)
    return flat


def batch_starts(name: str, batch: Tensor, rows: Tensor, clouds: int | None = None) -> Tensor:
    """Convert PyG's `batch` (ascending, one cloud number for each row) to `ptr` (where each cloud starts)."""
    if len(batch) != len(rows):
        raise ValueError(f"{name}: expected shape ({len(rows)},), got {tuple(batch.shape)}")
    wrong = batch < torch.cat([batch.new_zeros(min(1, len(batch))), batch[:-1]])
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected numbers from 0 in ascending order, got {int(batch[first])} at position {first}"
        )
    if clouds is None:
        clouds = cloud_count(batch)
    return torch.searchsorted(batch, torch.arange(clouds + 1, device=rows.device))


def check_starts(name: str, ptr: Tensor, rows: int) -> None:
    """Refuse `ptr` that does not ascend from 0 to the number of rows; reads the data."""
    numbers = ptr.tolist()
    if not numbers:
        raise ValueError(f"{name}: expected shape (B + 1,), got (0,)")
    if (numbers[0], numbers[-1]) != (0, rows):
        raise ValueError(f"{name}: expected numbers from 0 to {rows}, got {numbers[0]} to {numbers[-1]}")
    for position, (before, number) in enumerate(itertools.pairwise(numbers), 1):
        if number < before:
            raise ValueError(f"{name}: expected numbers that never descend, got {number} at position {position}")


def cloud_count(batch: Tensor) -> int:
    """Return the number of clouds in a sorted `batch`."""
    return int(batch[-1]) + 1 if len(batch) else 0
