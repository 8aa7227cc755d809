"""Activation and norm of nodes, and of edges without storing any edge."""

from __future__ import annotations

import itertools
from collections.abc import Callable
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
from paper_layers.ops.edge_conv_norm import edge_conv_norm, normalize_edges
from paper_layers.ops.running_statistics import Running, move_running_statistics

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
    mean, var = (moment[0] for moment in _moments(rows[None].to(accumulation(rows)), None))
    if _world_size(norm) > 1:
        mean, var, count = _combine_ranks(mean, var, count, norm.process_group)
    else:
        _refuse_one_value("x", count)
    _update_running(norm, mean, var, count.long())
    factor = (var + norm.eps).rsqrt() if norm.weight is None else (var + norm.eps).rsqrt() * norm.weight
    output = (rows.to(mean.dtype) - mean) * factor
    return (output if norm.bias is None else output + norm.bias).to(rows.dtype)


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

    Batch norm normalises over all edges, instance norm over the edges of each cloud. The terms are rows (M, C) for a
    table (M, k), and the rows of all clouds, (B M, C), for (B, M, k).
    """
    if not act_norm.instance:
        return _edge_max_one_set(center, neighbor, index, act_norm)
    if index.dim() == 3:
        clouds = zip(*_by_cloud(center, neighbor, index), index, strict=True)
        outputs = [_edge_max_one_set(*cloud, act_norm) for cloud in clouds]
        return torch.stack(outputs) if outputs else center.view(*index.shape[:2], center.shape[1])
    if ptr is None:
        return _edge_max_one_set(center, neighbor, index, act_norm)
    starts = check_starts("ptr", ptr, len(center))
    rows = [slice(first, last) for first, last in itertools.pairwise(starts) if first < last]
    return torch.cat([center[:0], *(_edge_max_one_set(center[r], neighbor, index[r], act_norm) for r in rows)])


def _edge_max_one_set(center: Tensor, neighbor: Tensor, index: Tensor, act_norm: ActNorm) -> Tensor:
    """Compute `edge_max` for edges that share their statistics."""
    act, norm, order, instance = act_norm
    if norm is None and not instance:
        return edge_conv(
            *_by_cloud(center, neighbor, index), index, negative_slope=_negative_slope(act), return_statistics=False
        ).output
    act_first = order == "act_norm"
    normalized = _normalized_edges(center, neighbor, index, norm, _negative_slope(act) if act_first else 1.0)
    output = normalized(False)
    if act_first or act is None:
        return output
    output = act(output)
    if isinstance(act, nn.PReLU) or (isinstance(act, nn.LeakyReLU) and act.negative_slope < 0):
        # The activation decreases below zero, so the edge at the other end may become the largest.
        output = torch.maximum(output, act(normalized(True)))
    return output


def _normalized_edges(
    center: Tensor, neighbor: Tensor, index: Tensor, norm: BatchNorm | None, slope: float | Tensor
) -> Callable[[bool], Tensor]:
    """Return a function of `opposite`, see `edge_conv_norm`, to call first with False: it moves running statistics."""
    if norm is None:
        weight = bias = mean = var = None
        batch, eps = True, INSTANCE_EPS
    else:
        weight, bias, eps, batch = norm.weight, norm.bias, norm.eps, _uses_batch_statistics(norm)
        mean, var = (None, None) if batch else (norm.running_mean, norm.running_var)
    if norm is not None and batch and _world_size(norm) > 1:
        smallest = (
            torch.zeros(center.shape[1], dtype=torch.bool, device=center.device) if weight is None else weight < 0
        )
        kept, mean, var = edge_conv(
            *_by_cloud(center, neighbor, index), index, negative_slope=slope, minimum_where=smallest
        )
        mean, var, count = _combine_ranks(mean, var, (index >= 0).sum(), norm.process_group)
        _update_running(norm, mean, var, count.long())

        def synchronized(opposite: bool) -> Tensor:
            options: Any = {"negative_slope": slope, "minimum_where": ~smallest, "return_statistics": False}
            extreme = edge_conv(*_by_cloud(center, neighbor, index), index, **options).output if opposite else kept
            return normalize_edges(extreme, mean, var, weight, bias, index, eps)

        return synchronized

    def normalized(opposite: bool) -> Tensor:
        result = edge_conv_norm(
            center,
            neighbor,
            index,
            negative_slope=slope,
            weight=weight,
            bias=bias,
            mean=mean,
            var=var,
            eps=eps,
            opposite=opposite,
        )
        if batch and not opposite:
            _refuse_one_value("index", result.count)
            if norm is not None:
                _update_running(norm, result.mean, result.var, result.count)
        return result.output

    return normalized


def _by_cloud(center: Tensor, neighbor: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the terms in the dimensions of the table."""
    if index.dim() == 2:
        return center, neighbor
    clouds, nodes = index.shape[:2]
    rows = len(neighbor) // max(1, clouds)
    return center.view(clouds, nodes, center.shape[1]), neighbor.view(clouds, rows, center.shape[1])


def _negative_slope(act: nn.Module | None) -> float | Tensor:
    """Return the slope of the activation below zero."""
    if isinstance(act, nn.PReLU):
        return act.weight
    if isinstance(act, nn.LeakyReLU):
        return act.negative_slope
    return 0.0 if isinstance(act, nn.ReLU) else 1.0


def _uses_batch_statistics(norm: BatchNorm) -> bool:
    return norm.training or norm.running_mean is None


def _refuse_one_value(name: str, counts: Tensor) -> None:
    """Refuse to normalise a single value, unless reading the counts would wait for a device or break a graph."""
    if torch.compiler.is_compiling() or not counts.is_cpu:
        return
    try:
        one = counts.item() == 1 if counts.dim() == 0 else bool((counts == 1).any())
    except RuntimeError:  # A fake tensor, or a tensor of vmap with one count for each element.
        return
    if one:
        raise ValueError(f"{name}: expected more than one value to normalise each channel with, got 1")


def _world_size(norm: BatchNorm | None) -> int:
    """Return how many processes share the norm's statistics."""
    if isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        return dist.get_world_size(norm.process_group)
    return 1


def _update_running(norm: BatchNorm, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Move the running statistics, unless checkpointing recomputes the forward pass."""
    if norm.running_mean is None or not norm.track_running_stats or recomputing():
        return
    assert norm.running_var is not None
    batches = [] if norm.num_batches_tracked is None else [norm.num_batches_tracked]
    move_running_statistics(Running([norm.running_mean], [norm.running_var], batches, norm.momentum), mean, var, count)


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
