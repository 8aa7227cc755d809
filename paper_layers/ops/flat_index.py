"""Convert neighbours within clouds to neighbours in all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from paper_layers._core.library import define
from paper_layers._core.vmap import one_by_one


def check_rows(index: Tensor, rows: int) -> None:
    """Refuse numbers that are neither a row nor -1, as the kernels do; reads the data."""
    wrong = (index < -1) | (index >= rows)
    if wrong.any():
        raise RuntimeError(f"index: expected -1 or a row below {rows}, got {int(index[wrong][0])}")


def across_clouds(index: Tensor, rows: int) -> Tensor:
    """Compute what the op does, in PyTorch."""
    if index.numel() == 0:
        return index.new_empty(index.shape[0] * index.shape[1], index.shape[2])
    check_rows(index, rows)
    start = torch.arange(index.shape[0], device=index.device)[:, None, None] * rows
    return torch.where(index < 0, -1, index + start).flatten(0, 1)


def _fake(index: Tensor, rows: int) -> Tensor:
    return index.new_empty(index.shape[0] * index.shape[1], index.shape[2])


_op = define("flat_index(Tensor index, SymInt rows) -> Tensor", across_clouds, _fake, vmap=one_by_one)


def flat_index(index: Tensor, rows: int) -> Tensor:
    """Convert neighbours (B, M, k) within clouds of so many rows to neighbours (B M, k) in all rows; -1 stays.

    An index outside its own cloud is an error, not a row of the next cloud.
    """
    flat: Tensor = _op(index, rows)
    return flat
