"""Tables of neighbours that the ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def flat_index(index: Tensor, rows: int) -> Tensor:
    """Neighbours (B, M, k) within clouds of so many rows as neighbours (B M, k) in all rows; -1 stays."""
    start = torch.arange(index.shape[0], device=index.device)[:, None, None] * rows
    return torch.where(index < 0, -1, index + start).flatten(0, 1)


def batch_starts(name: str, batch: Tensor, rows: Tensor, clouds: int | None = None) -> Tensor:
    """Where the clouds start whose ascending numbers stand in `batch`, one for each of the rows: PyG's ptr."""
    if len(batch) != len(rows):
        raise ValueError(f"{name}: expected shape ({len(rows)},), got {tuple(batch.shape)}")
    if bool((batch[1:] < batch[:-1]).any()) or bool((batch[:1] < 0).any()):
        raise ValueError(f"{name}: expected numbers from 0 in ascending order, got others")
    if clouds is None:
        clouds = cloud_count(batch)
    return torch.searchsorted(batch, torch.arange(clouds + 1, device=rows.device))


def cloud_count(batch: Tensor) -> int:
    """How many clouds ascending numbers tell of."""
    return int(batch[-1]) + 1 if len(batch) else 0
