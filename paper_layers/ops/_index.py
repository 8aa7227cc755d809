"""Tables of neighbours that the ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def flat_index(index: Tensor, rows: int) -> Tensor:
    """Neighbours (B, M, k) within clouds of so many rows as neighbours (B M, k) in all rows; -1 stays."""
    start = torch.arange(index.shape[0], device=index.device)[:, None, None] * rows
    return torch.where(index < 0, -1, index + start).flatten(0, 1)
