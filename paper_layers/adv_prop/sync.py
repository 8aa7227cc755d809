"""Split batch norm over the batches of all processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from paper_layers._core import checks, dtypes
from paper_layers._core._torch_private import BatchNorm
from paper_layers.adv_prop.norm import AuxiliaryNorm2d, SplitBatchNorm, affine_of
from paper_layers.ops.split_batch_norm.op import per_split_parameters
from paper_layers.ops.split_batch_norm.steps import (
    split_backward_input,
    split_backward_sums,
    split_normalize,
    split_statistics,
)


class SplitSyncBatchNorm(SplitBatchNorm, nn.BatchNorm2d):
    """Split batch norm whose parts are synchronised, each by itself, over all processes: see `SplitBatchNorm2d`.

    In training a branch has the statistics of its parts in all of them, as `nn.SyncBatchNorm` has of whole batches.
    Batches may differ in size, be empty, and be on a CPU, where DistributedDataParallel refuses an `nn.SyncBatchNorm`:
    so this is none, but an `nn.BatchNorm2d` for tools that freeze norms. A batch that one process cannot split, and
    processes that run different branches, are an error in all of them. As with any collective, all of them must run the
    norm, in training mode: one that does not lets the others wait.

    Args:
        *args: As in `SplitBatchNorm2d`, and the keyword arguments as well.
        process_group: Which processes; default all.

    Shapes:
        Input and output (N, C, ...), of one memory format.

    Example:
        >>> import torch
        >>> from paper_layers.adv_prop import SplitSyncBatchNorm
        >>> SplitSyncBatchNorm(16)(torch.randn(4, 16, 8, 8)).shape  # One process alone has nothing to wait for.
        torch.Size([4, 16, 8, 8])
    """

    auxiliary_class = AuxiliaryNorm2d

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        checks.shape("input", input, ("N", "C", "..."))

    def _is_synchronised(self) -> bool:
        group = self.process_group
        return self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1

    def _parts(self, input: Tensor, norms: Sequence[BatchNorm]) -> list[int]:
        try:
            return super()._parts(input, norms)
        except ValueError:
            if self._is_synchronised():  # The others wait for this process's values: tell them that none will come.
                rows = torch.zeros(self.num_splits, 1 + 2 * input.shape[1], dtype=dtypes.accumulation(input))
                rows[:, 0] = -1 - input.shape[0]
                _gather(rows.to(input.device), self.process_group)
            raise

    def _normalize(
        self, input: Tensor, norms: Sequence[BatchNorm], sizes: list[int]
    ) -> tuple[Tensor, Tensor, Tensor, Sequence[Any]]:
        if not self._is_synchronised():
            return super()._normalize(input, norms, sizes)
        splits, affine = len(sizes), zip(("weight", "bias"), affine_of(norms), strict=True)
        stacked = [per_split_parameters(name, values, splits, input) for name, values in affine]
        flat = input.flatten(2) if input.dim() > 2 else input[..., None]
        first = 0 if splits > 1 else self._branch or 0
        options = sizes, slice(first, first + splits), self.num_splits, self.eps, self.process_group
        output, mean, var, counts = _Synchronised.apply(flat, *stacked, options)
        return output.reshape(input.shape), mean, var, counts


def _gather(own: Tensor, group: Any) -> Tensor:
    """Rows of all processes: how many values each of their splits has, and what goes with it."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group)
    return torch.stack(parts)


def _totals(counts: list[list[float]], run: slice) -> list[int]:
    """How many values the splits have in all processes, from the counts of each: the same error in each of them."""
    for rank, (first, *_) in enumerate(counts):
        if first < 0:
            raise ValueError(
                "input: expected a batch that the norms of every process can split, "
                f"got {int(-1 - first)} on rank {rank}"
            )
    branches = [[i for i, count in enumerate(row) if count != math.inf] for row in counts]
    if any(some != branches[0] for some in branches):
        raise ValueError(f"branch: expected the same branches in every process, got {branches} by rank")
    totals = [int(sum(column)) for column in zip(*(row[run] for row in counts), strict=True)]
    if 1 in totals:
        raise ValueError(
            f"split_sizes: expected at least 2 values per channel in each split over all processes, got {totals}"
        )
    return totals


class _Synchronised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, options: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        sizes, run, num_splits, eps, group = options
        ctx.eps, ctx.group = eps, group
        some, own_sizes = ctx.own = _filled(sizes, input.shape[2])
        # All branches have a row, so that processes that run different ones find out.
        rows = input.new_zeros(num_splits, 1 + 2 * input.shape[1], dtype=dtypes.accumulation(input))
        rows[:, 0] = math.inf
        own = rows[run].zero_()
        if own_sizes:
            own[some, 1:] = torch.cat(split_statistics(input, own_sizes), 1)
        own[:, 0] = own.new_tensor(sizes) * input.shape[2]
        channels = input.shape[1]
        gathered = _gather(rows, group)
        totals = _totals(gathered[..., 0].tolist(), run)  # The one wait of the host for the device.
        counts, means, variances = gathered[:, run].split([1, channels, channels], 2)
        count = counts.sum(0)
        shares = counts / count.clamp(min=1)
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean).square())).sum(0)
        ctx.mark_non_differentiable(mean, var)
        ctx.has_bias = bias is not None
        ctx.save_for_backward(input, weight, mean, var, count)
        if not own_sizes:
            return torch.empty_like(input), mean, var, totals
        chosen = (None if values is None else values[some] for values in (weight, bias, mean, var))
        return split_normalize(input, *chosen, own_sizes, eps), mean, var, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, weight, mean, var, count = ctx.saved_tensors
        some, own_sizes = ctx.own
        sums = mean.new_zeros(2, *mean.shape)
        if own_sizes:
            own = split_backward_sums(grad, input, mean[some], var[some], own_sizes, ctx.eps)
            sums[:, some] = torch.stack(own)
        grad_weight, grad_bias = sums.clone()  # This process's alone.
        dist.all_reduce(sums, group=ctx.group)
        if own_sizes:
            means = sums / count.clamp(min=1)
            chosen = (None if values is None else values[some] for values in (weight, mean, var, *means))
            grad_input = split_backward_input(grad, input, *chosen, own_sizes, ctx.eps)
        else:
            grad_input = torch.empty_like(input)
        return grad_input, None if weight is None else grad_weight, grad_bias if ctx.has_bias else None, None


def _filled(sizes: list[int], pixels: int) -> tuple[Any, list[int]]:
    """The splits that have values in this process, as an index, and their sizes."""
    if all(size * pixels for size in sizes):
        return slice(None), sizes
    some = [i for i, size in enumerate(sizes) if size * pixels]
    return some, [sizes[i] for i in some]
