"""Clouds of different sizes one after the other: where they start, and what all points of one have in common."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from paper_layers._core import checks
from paper_layers._core.ragged import batch_starts, check_starts


def ptr_of(x: Tensor, batch: Tensor | None, ptr: Tensor | None) -> Tensor | None:
    """Where the clouds of (N, C) start, from either form; None for (B, N, C) and for one cloud."""
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
    # On an accelerator, reading the values here would wait for it; the kernels check them anyway.
    if numbers.is_cpu and not torch.compiler.is_compiling():
        check_starts(name, numbers, len(x))
    return numbers


def global_pool(x: Tensor, ptr: Tensor | None, reduction: Literal["max", "mean"]) -> Tensor:
    """One row a cloud: (B, C), with (1, C) for (N, C) without `ptr`."""
    if ptr is not None:
        cloud = _cloud(x, ptr)
        counts = ptr.diff()[:, None]
        if reduction == "mean":
            return x.new_zeros(len(counts), x.shape[1]).index_add(0, cloud, x) / counts.clamp(min=1)
        # From -inf, not 0: a start that equals the maximum would take a share of the gradient. And not segment_reduce,
        # which hands a negative gradient to each of several equals in full.
        largest = x.new_full((len(counts), x.shape[1]), -torch.inf).scatter_reduce(
            0, cloud[:, None].expand_as(x), x, "amax"
        )
        return largest.where(counts > 0, 0)
    rows = x if x.dim() == 3 else x[None]
    if rows.shape[1] == 0:  # As a cloud without points among those of `ptr`.
        return rows.sum(1)
    return rows.amax(1) if reduction == "max" else rows.mean(1)


def broadcast_to_rows(x: Tensor, like: Tensor, ptr: Tensor | None) -> Tensor:
    """A row for each node of its cloud's."""
    if ptr is not None:
        return x[_cloud(like, ptr)]
    return x[:, None] if like.dim() == 3 else x


def _cloud(rows: Tensor, ptr: Tensor) -> Tensor:
    """The number of each row's cloud."""
    return torch.arange(len(ptr) - 1, device=ptr.device).repeat_interleave(ptr.diff(), output_size=len(rows))
