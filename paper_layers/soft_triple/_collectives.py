"""Collectives for losses whose classes are sharded over ranks, with the gradients that DDP expects.

Each rank has its own loss, and DDP minimises their mean J by averaging its parameters' gradients over the ranks. For
`world` ranks, an embedding's gradient is therefore `world` times the gradient of J. Parameters that DDP does not
average, such as the centers, get the gradient of J itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_rows(rows: Tensor, sizes: list[int], group: Any) -> Tensor:
    """Concatenate the rows (size, ...) of all ranks, without gradients."""
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class Gather(torch.autograd.Function):
    """`gather_rows` with gradients; `dtype` is the dtype in which they are summed."""

    @staticmethod
    def forward(rows: Tensor, sizes: list[int], group: Any, dtype: torch.dtype) -> Tensor:
        return gather_rows(rows, sizes, group).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, ctx.sizes, ctx.group, _ = inputs
        ctx.dtype = rows.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        own = total.split(ctx.sizes)[dist.get_rank(ctx.group)]
        return (own * len(ctx.sizes)).to(ctx.dtype), None, None, None


class Join(torch.autograd.Function):
    """Join each rank's outputs of `soft_triple`, shapes (B,), (B,) and (), to those of all classes.

    The last output is a factor of the gradients.
    """

    @staticmethod
    def forward(others: Tensor, target: Tensor, distance: Tensor, group: Any) -> tuple[Tensor, ...]:
        # Finite also if no rank has another class than the row's own.
        highest = others.clamp(min=torch.finfo(others.dtype).min).contiguous()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        own = (others - highest).exp()
        sums = torch.cat([own, target, distance[None]])
        dist.all_reduce(sums, group=group)
        total, target, distance = sums.split([len(target), len(target), 1])
        share = own / total.where(total != 0, 1)
        return highest + total.log(), target.clone(), distance[0].clone(), share

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.group = inputs[3]
        ctx.mark_non_differentiable(output[3])
        ctx.save_for_backward(output[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = len(grads[0])
        mean = torch.cat([*grads[:2], grads[2][None]])
        dist.all_reduce(mean, group=ctx.group)
        of_joint, of_target, of_distance = (mean / dist.get_world_size(ctx.group)).split([rows, rows, 1])
        (share,) = ctx.saved_tensors
        return of_joint * share, of_target, of_distance[0], None
