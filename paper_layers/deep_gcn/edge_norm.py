"""Activation and norm of all edges of a graph, of which each node keeps the largest: no edge is stored."""

from __future__ import annotations

import itertools
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from paper_layers._core.fusing import readable
from paper_layers._core.recompute import recomputing
from paper_layers.ops.edge_conv import edge_conv

Order = Literal["act_norm", "norm_act"]
BatchNorm = nn.BatchNorm1d | nn.SyncBatchNorm
INSTANCE_EPS = 1e-5


def may_fuse(act: Any, norm: nn.Module | None) -> bool:
    """Return True where `max_over_edges` computes what a call of the activation and a call of the norm give."""
    if norm is not None and not readable(norm, nn.BatchNorm1d, nn.SyncBatchNorm):
        return False
    if act is None or readable(act, nn.ReLU, nn.LeakyReLU):
        return True
    return readable(act, nn.PReLU) and act.weight.numel() == 1


def batch_norm(norm: nn.Module, rows: Tensor) -> Tensor:
    """Normalise rows. Running statistics don't move a second time where a forward pass is computed again."""
    if norm.training and recomputing():
        return functional_call(norm, {name: buffer.clone() for name, buffer in norm.named_buffers()}, (rows,))
    return norm(rows)


def max_over_edges(
    center: Tensor,
    neighbor: Tensor,
    index: Tensor,
    act: nn.Module | None,
    norm: BatchNorm | Literal["instance"] | None,
    order: Order = "act_norm",
    ptr: Tensor | None = None,
) -> Tensor:
    """Activate and normalise the edges ``center[i] + neighbor[j]`` and keep the largest of each node.

    Batch norm takes all edges together, instance norm those of each cloud. Nodes without neighbours get what a kept
    edge of 0 would become.
    """
    if norm != "instance" or (center.dim() == 2 and ptr is None):
        return _one_set(center, neighbor, index, act, norm, order)
    if center.dim() == 3:
        clouds = zip(center, neighbor, index, strict=True)
        outputs = [_one_set(*cloud, act, norm, order) for cloud in clouds]
        return torch.stack(outputs) if outputs else center
    bounds = [] if ptr is None else ptr.tolist()
    if bounds[:1] != [0] or bounds[-1] != len(center) or sorted(bounds) != bounds:
        raise ValueError(f"ptr: expected ascending numbers from 0 to {len(center)}, got {bounds}")
    rows = [slice(first, last) for first, last in itertools.pairwise(bounds) if first < last]
    return torch.cat([center[:0], *(_one_set(center[r], neighbor, index[r], act, norm, order) for r in rows)])


def _one_set(
    center: Tensor,
    neighbor: Tensor,
    index: Tensor,
    act: nn.Module | None,
    norm: BatchNorm | Literal["instance"] | None,
    order: Order,
) -> Tensor:
    """Edges that are normalised together."""
    act_first = order == "act_norm" or norm is None
    slope = _slope(act) if act_first else 1.0
    batch_norm = None if isinstance(norm, str) else norm
    # A negative factor of the norm makes the smallest edge the largest.
    smallest = None if batch_norm is None or batch_norm.weight is None else batch_norm.weight < 0
    wanted = norm == "instance" or (batch_norm is not None and _uses_batch_statistics(batch_norm))
    count = (index >= 0).sum() if wanted else None
    if count is not None and _is_one(count) and _ranks(batch_norm) == 1:
        raise ValueError("input: expected more than one value to normalise each channel with, got 1")
    kept, mean, var = edge_conv(
        center, neighbor, index, negative_slope=slope, minimum_where=smallest, return_statistics=wanted
    )
    if norm is None:
        return kept
    if batch_norm is None:
        scale = (var + INSTANCE_EPS).rsqrt()
        shift = -mean * scale
    else:
        scale, shift = _scale_and_shift(batch_norm, mean, var, count)
    output = _affine(kept, scale, shift)
    if act_first or act is None:
        return output
    output = act(output)
    if isinstance(act, nn.PReLU) or (isinstance(act, nn.LeakyReLU) and act.negative_slope < 0):
        # With a negative slope the activation falls below zero: then either end may become the largest.
        opposite = torch.ones_like(scale, dtype=torch.bool) if smallest is None else ~smallest
        other, _, _ = edge_conv(
            center, neighbor, index, negative_slope=1.0, minimum_where=opposite, return_statistics=False
        )
        output = torch.maximum(output, act(_affine(other, scale, shift)))
    return output


def _slope(act: nn.Module | None) -> float | Tensor:
    """The factor of the activation below zero."""
    if isinstance(act, nn.PReLU):
        return act.weight
    if isinstance(act, nn.LeakyReLU):
        return act.negative_slope
    return 0.0 if isinstance(act, nn.ReLU) else 1.0


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)


def _uses_batch_statistics(norm: BatchNorm) -> bool:
    return norm.training or norm.running_mean is None


def _is_one(count: Tensor) -> bool:
    """Return whether there is one edge, where the answer costs no wait for a device and no break of a graph."""
    if torch.compiler.is_compiling() or not count.is_cpu:
        return False
    try:
        return int(count) == 1
    except RuntimeError:  # A fake tensor, or one of vmap's: each of its elements has a count of its own.
        return False


def _ranks(norm: BatchNorm | None) -> int:
    """How many processes normalise together."""
    if isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        return dist.get_world_size(norm.process_group)
    return 1


def _scale_and_shift(norm: BatchNorm, mean: Tensor, var: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
    """What normalises: factor and summand of each channel. In training the running statistics follow."""
    if count is None:
        mean, var = norm.running_mean, norm.running_var  # type: ignore[assignment]
    else:
        if _ranks(norm) > 1:
            mean, var, count = _of_all_ranks(mean, var, count, norm.process_group)
        if norm.running_mean is not None and norm.track_running_stats and not recomputing():
            _follow(norm, mean.detach(), var.detach(), count)
    scale = (var + norm.eps).rsqrt()
    weight, bias = cast(Tensor | None, norm.weight), cast(Tensor | None, norm.bias)
    scale = scale if weight is None else scale * weight
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)


@torch.no_grad()
def _follow(norm: BatchNorm, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Move the running statistics as torch does: not on a batch without edges, which counts as a batch nonetheless."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    batches = norm.num_batches_tracked
    if batches is not None:
        batches.add_(1)
    rate: Any = norm.momentum
    if rate is None:  # Without a count of batches torch's cumulative average stands still.
        rate = 0.0 if batches is None else batches.to(mean.dtype).reciprocal()
    unbiased = var * count / (count - 1).clamp(min=1)
    norm.running_mean.add_(((mean - norm.running_mean) * rate).where(count > 1, 0))
    norm.running_var.add_(((unbiased - norm.running_var) * rate).where(count > 1, 0))


def _of_all_ranks(mean: Tensor, var: Tensor, count: Tensor, group: object) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of all ranks' edges together, differentiable."""
    from torch.distributed.nn.functional import all_reduce

    group = group or dist.group.WORLD
    mine = count.to(mean.dtype)
    total = all_reduce(mine.clone(), group=group)
    joined = all_reduce(mean * mine, group=group) / total.clamp(min=1)
    spread = all_reduce((var + (mean - joined).square()) * mine, group=group) / total.clamp(min=1)
    return joined, spread, total
