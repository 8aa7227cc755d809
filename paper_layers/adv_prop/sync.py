"""Split batch norm over the batches of all processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from paper_layers._core import checks, dtypes
from paper_layers._core._torch_private import BatchNorm
from paper_layers.adv_prop._auxiliary import AuxiliaryNorm2d
from paper_layers.adv_prop.norm import SplitBatchNorm, affine_of
from paper_layers.ops.running_statistics import Running, move_running_statistics
from paper_layers.ops.split_batch_norm.op import check_parameters
from paper_layers.ops.split_batch_norm.steps import (
    split_backward_input,
    split_backward_sums,
    split_normalize,
    split_statistics,
)


class SplitSyncBatchNorm(SplitBatchNorm, nn.BatchNorm2d):
    """Split batch norm with each split's statistics taken over all processes: see `SplitBatchNorm2d`.

    In training, each split is synchronized as `nn.SyncBatchNorm` synchronizes whole batches. The batches of the
    processes may differ in size, be empty, and be on a CPU. The class is an `nn.BatchNorm2d`, not an
    `nn.SyncBatchNorm`, which DistributedDataParallel refuses on a CPU; tools that freeze norms find it. If one process
    can't split its batch, or processes run different splits, all of them raise an error. As with any collective, every
    process must run the norm in training mode; otherwise the others wait forever.

    Args:
        *args: See `SplitBatchNorm2d`, as for the keyword arguments.
        process_group: The processes; default all.

    Shape:
        Input and output (N, C, ...), of one memory format.

    Example:
        >>> import torch
        >>> from paper_layers.adv_prop import SplitSyncBatchNorm
        >>> SplitSyncBatchNorm(16)(torch.randn(4, 16, 8, 8)).shape  # A single process doesn't wait.
        torch.Size([4, 16, 8, 8])
    """

    auxiliary_class = AuxiliaryNorm2d

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        checks.shape("input", input, ("N", self.num_features, "..."))

    def _is_synchronized(self) -> bool:
        group = self.process_group
        return self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1

    def _sizes_for(self, input: Tensor, norms: Sequence[BatchNorm]) -> list[int]:
        try:
            return super()._sizes_for(input, norms)
        except ValueError:
            if self._is_synchronized():  # Tell the waiting processes that no values will come.
                rows = torch.zeros(self.num_splits, 1 + 2 * input.shape[1], dtype=dtypes.accumulation(input))
                rows[:, 0] = -1 - input.shape[0]
                _gather(rows.to(input.device), self.process_group)
            raise

    def _normalize(
        self, input: Tensor, norms: Sequence[BatchNorm], sizes: list[int], running: Running | None
    ) -> Tensor:
        if not self._is_synchronized():
            return super()._normalize(input, norms, sizes, running)
        splits, stacked = len(sizes), []
        for name, values in zip(("weight", "bias"), affine_of(norms), strict=True):
            check_parameters(name, values or None, splits, input)
            stacked.append(torch.stack(values).to(dtypes.accumulation(input)) if values else None)
        flat = input.flatten(2) if input.dim() > 2 else input[..., None]
        first = 0 if splits > 1 else self._split or 0
        options = sizes, slice(first, first + splits), self.num_splits, self.eps, self.process_group
        output, mean, var, counts = _Synchronized.apply(flat, *stacked, options)
        filled = [i for i, count in enumerate(counts) if count]
        if running is not None and filled:
            if len(filled) < splits:
                running, mean, var = self._running([norms[i] for i in filled]), mean[filled], var[filled]
            assert running is not None
            move_running_statistics(running, mean, var, [counts[i] for i in filled])
        return cast(Tensor, output.reshape(input.shape))


def _gather(own: Tensor, group: Any) -> Tensor:
    """Gather one row per split from every process: its number of values, mean and variance."""
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, own, group)
    return torch.stack(rows)


def _totals(counts: list[list[float]], run: slice) -> list[int]:
    """Sum the counts of each split over all processes. Every process raises the same errors."""
    for rank, (first, *_) in enumerate(counts):
        if first < 0:
            raise ValueError(
                "input: expected a batch that the norms of every process can split, "
                f"got {int(-1 - first)} on rank {rank}"
            )
    splits = [[i for i, count in enumerate(row) if count != math.inf] for row in counts]
    if any(some != splits[0] for some in splits):
        raise ValueError(f"split: expected the same splits in every process, got {splits} by rank")
    totals = [int(sum(column)) for column in zip(*(row[run] for row in counts), strict=True)]
    if 1 in totals:
        raise ValueError(
            f"split_sizes: expected at least 2 values per channel in each split over all processes, got {totals}"
        )
    return totals


class _Synchronized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, options: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        sizes, run, num_splits, eps, group = options
        ctx.eps, ctx.group = eps, group
        some, own_sizes = ctx.own = _filled(sizes, input.shape[2])
        # Send a row for every split, so that processes that run different splits notice.
        rows = input.new_zeros(num_splits, 1 + 2 * input.shape[1], dtype=dtypes.accumulation(input))
        rows[:, 0] = math.inf
        own = rows[run].zero_()
        if own_sizes:
            own[some, 1:] = torch.cat(split_statistics(input, own_sizes), 1)
        own[:, 0] = own.new_tensor(sizes) * input.shape[2]
        channels = input.shape[1]
        gathered = _gather(rows, group)
        totals = _totals(gathered[..., 0].tolist(), run)  # The host waits for the device only here.
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
        grad_weight, grad_bias = sums.clone()  # Only this process's: DDP averages them.
        dist.all_reduce(sums, group=ctx.group)
        if own_sizes:
            means = sums / count.clamp(min=1)
            chosen = (None if values is None else values[some] for values in (weight, mean, var, *means))
            grad_input = split_backward_input(grad, input, *chosen, own_sizes, ctx.eps)
        else:
            grad_input = torch.empty_like(input)
        return grad_input, None if weight is None else grad_weight, grad_bias if ctx.has_bias else None, None


def _filled(sizes: list[int], pixels: int) -> tuple[Any, list[int]]:
    """Return an index of the splits with local values, and their local sizes; other ranks contribute theirs."""
    if all(size * pixels for size in sizes):
        return slice(None), sizes
    some = [i for i, size in enumerate(sizes) if size * pixels]
    return some, [sizes[i] for i in some]
