"""Ragged clouds: find where they start, pool each cloud, and broadcast one row of each cloud to its points."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from paper_layers._core import checks
from paper_layers._core.ragged import batch_starts, check_starts


def ptr_of(x: Tensor, batch: Tensor | None, ptr: Tensor | None) -> Tensor | None:
    """Return where each cloud of (N, C) starts, from either form; None for (B, N, C) and for one cloud."""
    if batch is None and ptr is None:
        return None
    if batch is not None and ptr is not None:
        raise ValueError("ptr: expected either batch or ptr, got both")
    name, given = ("ptr", ptr) if batch is None else ("batch", batch)
    numbers = checks.numbers(name, cast(Tensor, given))
    checks.same_device(name, numbers, "x", x)
    if x.dim() == 3:
        raise ValueError(f"{name}: expected None for x of shape (B, N, C), got a Tensor")
    if batch is not None:
        return batch_starts(name, numbers, x)
    # Reading the values would wait for an accelerator; there the ops check them.
    if numbers.is_cpu and not torch.compiler.is_compiling():
        check_starts(name, numbers, len(x))
    return numbers


def global_pool(x: Tensor, ptr: Tensor | None, reduction: Literal["max", "mean"]) -> Tensor:
    """Reduce each cloud to one row, of shape (B, C); (N, C) without `ptr` is one cloud."""
    if ptr is not None:
        cloud = _cloud(x, ptr)
        counts = ptr.diff()[:, None]
        if reduction == "mean":
            return x.new_zeros(len(counts), x.shape[1]).index_add(0, cloud, x) / counts.clamp(min=1)
        # Start from -inf: a start that equals the maximum would take a share of the gradient. segment_reduce would give
        # each of several equal maxima the whole gradient where it is negative.
        largest = x.new_full((len(counts), x.shape[1]), -torch.inf).scatter_reduce(
            0, cloud[:, None].expand_as(x), x, "amax"
        )
        return largest.where(counts > 0, 0)
    rows = x if x.dim() == 3 else x[None]
    if rows.shape[1] == 0:  # As for an empty cloud in `ptr`.
        return rows.sum(1)
    return rows.amax(1) if reduction == "max" else rows.mean(1)


def broadcast_to_rows(x: Tensor, like: Tensor, ptr: Tensor | None) -> Tensor:
    """Return the row of its cloud for each node."""
    if ptr is not None:
        return x[_cloud(like, ptr)]
    return x[:, None] if like.dim() == 3 else x


def _cloud(rows: Tensor, ptr: Tensor) -> Tensor:
    """Return the number of each row's cloud."""
    return torch.searchsorted(ptr, torch.arange(len(rows), device=ptr.device), right=True) - 1
