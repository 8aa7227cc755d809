"""Split batch norm over the batches of all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from paper_layers.adv_prop.norm import SplitBatchNorm
from paper_layers.ops._split_batch_norm_steps import (
    split_backward_input,
    split_backward_sums,
    split_normalize,
    split_statistics,
)
from paper_layers.ops.split_batch_norm import check_split_sizes, parameters


class SplitSyncBatchNorm(SplitBatchNorm):
    """Split batch norm whose parts are synchronised, each by itself, over all processes: see `SplitBatchNorm2d`.

    In training a branch has the statistics of its parts in all of them, as `nn.SyncBatchNorm` has of whole batches.
    Batches may differ in size, and be on a CPU. All processes must run the same branches.

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

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input: expected shape (N, C, ...), got {tuple(input.shape)}")

    def _normalize(
        self, input: Tensor, weight: list[Tensor] | None, bias: list[Tensor] | None, sizes: list[int]
    ) -> tuple[Tensor, Tensor, Tensor, Sequence[Any]]:
        group = self.process_group
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1):
            return super()._normalize(input, weight, bias, sizes)
        sizes = check_split_sizes(input, sizes, values=1)  # Of this process: others have some as well.
        splits = len(sizes)
        stacked = [parameters(name, values, splits, input) for name, values in (("weight", weight), ("bias", bias))]
        flat = input.flatten(2) if input.dim() > 2 else input[..., None]
        output, mean, var, counts = _Synchronised.apply(flat, *stacked, (sizes, self.eps, group))
        return output.reshape(input.shape), mean, var, counts


class _Synchronised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, options: tuple[list[int], float, Any]
    ) -> tuple[Tensor, ...]:
        sizes, eps, group = ctx.options = options
        mean, var = split_statistics(input, sizes)
        count = mean.new_tensor(sizes)[:, None] * input.shape[2]
        own = torch.cat([count, mean, var], 1)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group)
        counts, means, variances = torch.stack(parts).split([1, *mean.shape[1:], *mean.shape[1:]], 2)
        count = counts.sum(0)
        shares = counts / count
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean).square())).sum(0)
        ctx.mark_non_differentiable(mean, var, count)
        ctx.has_bias = bias is not None
        ctx.save_for_backward(input, weight, mean, var, count)
        return split_normalize(input, weight, bias, mean, var, sizes, eps), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, weight, mean, var, count = ctx.saved_tensors
        sizes, eps, group = ctx.options
        grad_weight, grad_bias = split_backward_sums(grad, input, mean, var, sizes, eps)  # Of this process alone.
        sums = torch.stack([grad_weight, grad_bias])
        dist.all_reduce(sums, group=group)
        means = sums / count
        grad_input = split_backward_input(grad, input, weight, mean, var, means[0], means[1], sizes, eps)
        return grad_input, None if weight is None else grad_weight, grad_bias if ctx.has_bias else None, None
