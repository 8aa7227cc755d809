"""Activation and norm of nodes, and of edges without storing any edge."""

from __future__ import annotations

import itertools
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from paper_layers._core.dtypes import accumulation
from paper_layers._core.fusing import readable
from paper_layers._core.ragged import check_starts
from paper_layers._core.recompute import recomputing
from paper_layers.deep_gcn._clouds import broadcast_to_rows, global_pool
from paper_layers.ops.edge_conv import edge_conv

Order = Literal["act_norm", "norm_act"]
BatchNorm = nn.BatchNorm1d | nn.SyncBatchNorm
INSTANCE_EPS = 1e-5


class ActNorm(NamedTuple):
    """Activation and norm of edges, and their order; instance norm has no module."""

    act: nn.Module | None
    norm: BatchNorm | None
    order: Order
    instance: bool = False


def may_fuse(act: Any, norm: nn.Module | None) -> bool:
    """Return True where `edge_max` may compute the activation and the norm in place of calling them."""
    if norm is not None and not readable(norm, nn.BatchNorm1d, nn.SyncBatchNorm):
        return False
    if act is None or readable(act, nn.ReLU, nn.LeakyReLU):
        return True
    return readable(act, nn.PReLU) and act.weight.numel() == 1


def batch_norm(norm: nn.Module, rows: Tensor) -> Tensor:
    """Normalise rows. A forward pass that checkpointing recomputes does not update running statistics again."""
    if readable(norm, nn.SyncBatchNorm):  # Torch's own does not run on a CPU.
        return _synchronized_norm(cast(nn.SyncBatchNorm, norm), rows)
    if norm.training and recomputing():
        return functional_call(norm, {name: buffer.clone() for name, buffer in norm.named_buffers()}, (rows,))
    return norm(rows)


def _synchronized_norm(norm: nn.SyncBatchNorm, rows: Tensor) -> Tensor:
    if not _uses_batch_statistics(norm):
        return norm(rows)
    count = torch.full((), len(rows), device=rows.device)
    if _world_size(norm) == 1:
        _refuse_one_value("x", count)
    mean, var = _moments(rows[None].to(accumulation(rows)), None)
    return _affine(rows, *_scale_and_shift(norm, mean[0], var[0], count))


def instance_norm(x: Tensor, ptr: Tensor | None) -> Tensor:
    """Normalise each channel over the rows of each cloud."""
    _refuse_one_value("x", torch.full(x.shape[:-2], x.shape[-2]) if ptr is None else ptr.diff())
    wide = x.to(accumulation(x))
    mean, var = (broadcast_to_rows(moment, x, ptr) for moment in _moments(wide, ptr))
    return ((wide - mean) * (var + INSTANCE_EPS).rsqrt()).to(x.dtype)


def _moments(x: Tensor, ptr: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each cloud's mean and biased variance, of shape (B, C)."""
    mean = global_pool(x, ptr, "mean")
    return mean, global_pool((x - broadcast_to_rows(mean, x, ptr)).square(), ptr, "mean")


def edge_max(center: Tensor, neighbor: Tensor, index: Tensor, act_norm: ActNorm, ptr: Tensor | None = None) -> Tensor:
    """Return each node's maximum over its edges ``center[i] + neighbor[j]``, activated and normalised; 0 without edges.

    Batch norm normalises over all edges, instance norm over the edges of each cloud.
    """
    if act_norm.instance and ptr is not None:
        starts = check_starts("ptr", ptr, len(center))
        rows = [slice(first, last) for first, last in itertools.pairwise(starts) if first < last]
        output = torch.cat([center[:0], *(_edge_max_one_cloud(center[r], neighbor, index[r], act_norm) for r in rows)])
    elif act_norm.instance and center.dim() == 3:
        outputs = [_edge_max_one_cloud(*cloud, act_norm) for cloud in zip(center, neighbor, index, strict=True)]
        output = torch.stack(outputs) if outputs else center
    else:
        output = _edge_max_one_cloud(center, neighbor, index, act_norm)
    return output.where((index >= 0).any(-1, keepdim=True), 0)


def _edge_max_one_cloud(center: Tensor, neighbor: Tensor, index: Tensor, act_norm: ActNorm) -> Tensor:
    """Compute `edge_max` for edges that share their statistics."""
    act, norm, order, instance = act_norm
    act_first = order == "act_norm" or (norm is None and not instance)
    slope = _negative_slope(act) if act_first else 1.0
    # Where the norm's weight is negative, the smallest edge becomes the largest.
    smallest = None if norm is None or norm.weight is None else norm.weight < 0
    needs_statistics = instance or (norm is not None and _uses_batch_statistics(norm))
    count = (index >= 0).sum() if needs_statistics else None
    if count is not None and _world_size(norm) == 1:
        _refuse_one_value("index", count)
    extreme, mean, var = edge_conv(
        center, neighbor, index, negative_slope=slope, minimum_where=smallest, return_statistics=needs_statistics
    )
    if instance:
        scale = (var + INSTANCE_EPS).rsqrt()
        shift = -mean * scale
    elif norm is not None:
        scale, shift = _scale_and_shift(norm, mean, var, count)
    else:
        return extreme
    output = _affine(extreme, scale, shift)
    if act_first or act is None:
        return output
    output = act(output)
    if isinstance(act, nn.PReLU) or (isinstance(act, nn.LeakyReLU) and act.negative_slope < 0):
        # The activation decreases below zero, so the edge at the other end may become the largest.
        opposite = torch.ones_like(scale, dtype=torch.bool) if smallest is None else ~smallest
        other, _, _ = edge_conv(
            center, neighbor, index, negative_slope=1.0, minimum_where=opposite, return_statistics=False
        )
        output = torch.maximum(output, act(_affine(other, scale, shift)))
    return output


def _negative_slope(act: nn.Module | None) -> float | Tensor:
    """Return the slope of the activation below zero."""
    if isinstance(act, nn.PReLU):
        return act.weight
    if isinstance(act, nn.LeakyReLU):
        return act.negative_slope
    return 0.0 if isinstance(act, nn.ReLU) else 1.0


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)


def _uses_batch_statistics(norm: BatchNorm) -> bool:
    return norm.training or norm.running_mean is None


def _refuse_one_value(name: str, counts: Tensor) -> None:
    """Refuse to normalise a single value, unless reading the counts would wait for a device or break a graph."""
    if torch.compiler.is_compiling() or not counts.is_cpu:
        return
    try:
        one = bool((counts == 1).any())
    except RuntimeError:  # A fake tensor, or a tensor of vmap with one count for each element.
        return
    if one:
        raise ValueError(f"{name}: expected more than one value to normalise each channel with, got 1")


def _world_size(norm: BatchNorm | None) -> int:
    """Return how many processes share the norm's statistics."""
    if isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        return dist.get_world_size(norm.process_group)
    return 1


def _scale_and_shift(norm: BatchNorm, mean: Tensor, var: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return factor and summand of each channel. In training, update the running statistics."""
    if count is None:
        mean, var = norm.running_mean, norm.running_var  # type: ignore[assignment]
    else:
        if _world_size(norm) > 1:
            mean, var, count = _combine_ranks(mean, var, count, norm.process_group)
        if norm.running_mean is not None and norm.track_running_stats and not recomputing():
            _update_running(norm, mean.detach(), var.detach(), count)
    scale = (var + norm.eps).rsqrt()
    weight, bias = cast(Tensor | None, norm.weight), cast(Tensor | None, norm.bias)
    scale = scale if weight is None else scale * weight
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)


@torch.no_grad()
def _update_running(norm: BatchNorm, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Update running statistics as torch does. An empty batch only adds one to the number of batches."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    batches = norm.num_batches_tracked
    if batches is not None:
        batches.add_(1)
    rate: Any = norm.momentum
    if rate is None:  # Torch's cumulative mean does not move without num_batches_tracked.
        rate = 0.0 if batches is None else batches.to(mean.dtype).reciprocal()
    unbiased = var * count / (count - 1).clamp(min=1)
    norm.running_mean.add_(((mean - norm.running_mean) * rate).where(count > 1, 0))
    norm.running_var.add_(((unbiased - norm.running_var) * rate).where(count > 1, 0))


def _combine_ranks(mean: Tensor, var: Tensor, count: Tensor, group: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and count over all ranks, differentiably."""
    from torch.distributed.nn.functional import all_reduce

    group = group or dist.group.WORLD
    local_count = count.to(mean.dtype)
    total = all_reduce(local_count.clone(), group=group)
    total_mean = all_reduce(mean * local_count, group=group) / total.clamp(min=1)
    deviation = (mean - total_mean).square()
    total_var = all_reduce((var + deviation) * local_count, group=group) / total.clamp(min=1)
    return total_mean, total_var, total
