"""The edge pass of EdgeConv with the norm that follows it: the op, its backward, and the function that layers call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from paper_layers._core import dtypes
from paper_layers._core.differentiable import differentiable
from paper_layers._core.library import define
from paper_layers._core.vmap import one_by_one
from paper_layers.ops.edge_conv import (
    as_rows,
    edge_gradients,
    edge_mean,
    edge_variance,
    kept_edges,
    promoted,
    slope_tensor,
    split_slope,
)


class NormalizedEdges(NamedTuple):
    """The kept edge of each node, normalised, and the statistics that it was normalised with.

    Attributes:
        output: Features of shape (M, C) or (B, M, C).
        mean: Shape (C,), or (0,) where the statistics were given; without gradient.
        var: The biased variance, likewise.
        count: The number of edges, an int64 scalar.
    """

    output: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


def normalize_edges(
    extreme: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, index: Tensor, eps: float
) -> Tensor:
    """Normalise each node's kept edge; 0 without edges."""
    factor = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    deviation = extreme.to(mean.dtype) - mean
    output = deviation * factor if bias is None else torch.addcmul(bias, deviation, factor)
    return output.where((index >= 0).any(-1, keepdim=True), 0).to(extreme.dtype)


def _smallest(weight: Tensor | None, opposite: bool, channels: Tensor) -> Tensor:
    """Return where the smallest edge is kept: a batch norm's negative factor makes it the largest."""
    return (torch.zeros_like(channels, dtype=torch.bool) if weight is None else weight < 0) ^ opposite


def _reference(
    center: Tensor,
    neighbor: Tensor,
    index: Tensor,
    slope: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    number: float,
    eps: float,
    opposite: bool,
) -> tuple[Tensor, ...]:
    factor, rows = slope_tensor(center, slope, number), as_rows(center, neighbor, index)
    none = factor.new_empty(0)
    own_mean = edge_mean(*rows, factor) if mean is None else none
    own_var = edge_variance(*rows, factor, own_mean) if var is None else none
    with_mean, with_var = (own_mean, own_var) if mean is None or var is None else (mean, var)
    extreme = kept_edges(*rows, factor, _smallest(weight, opposite, with_mean))
    output = normalize_edges(extreme, with_mean, with_var, weight, bias, rows[2], eps)
    shape = (*index.shape[:-1], center.shape[-1])
    return output.view(shape), extreme.view(shape), own_mean, own_var, (index >= 0).sum()


def _fake(center: Tensor, neighbor: Tensor, index: Tensor, *others: Any) -> tuple[Tensor, ...]:
    shape = (*index.shape[:-1], center.shape[-1])
    channels, wide = center.shape[-1] if others[3] is None else 0, dtypes.accumulation(center)
    mean, var = (center.new_empty(channels, dtype=wide) for _ in range(2))
    return center.new_empty(shape), center.new_empty(shape), mean, var, index.new_empty(())


def _gradients(
    grad: Tensor, rows: tuple[Tensor, Tensor, Tensor], slope: Tensor, weight: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    extreme, mean, var, eps, batch = others
    grad = grad.flatten(0, -2).to(mean.dtype).where((rows[2] >= 0).any(-1, keepdim=True), 0)
    invstd = (var + eps).rsqrt()
    factor = invstd if weight is None else invstd * weight
    total, product = grad.sum(0), (grad * (extreme.to(mean.dtype) - mean)).sum(0)
    grad_var = -0.5 * product * invstd.square() * factor
    of_batch = mean if batch else mean.new_empty(0)
    found = edge_gradients(grad * factor, -total * factor, grad_var, *rows, slope, extreme.detach(), of_batch)
    return *found, product * invstd, total


def _backward_reference(
    grad: Tensor,
    center: Tensor,
    neighbor: Tensor,
    index: Tensor,
    slope: Tensor | None,
    weight: Tensor | None,
    extreme: Tensor,
    mean: Tensor,
    var: Tensor,
    number: float,
    eps: float,
    batch: bool,
) -> tuple[Tensor, ...]:
    factor, rows = slope_tensor(center, slope, number), as_rows(center, neighbor, index)
    found = _gradients(grad, rows, factor, weight, extreme.flatten(0, -2), mean, var, eps, batch)
    return found[0].view(center.shape), found[1].view(neighbor.shape), *found[2:]


def _backward_fake(grad: Tensor, center: Tensor, neighbor: Tensor, *others: Any) -> tuple[Tensor, ...]:
    mean = others[4]
    parts = (mean.new_empty(()), torch.empty_like(mean), torch.empty_like(mean))
    return center.new_empty(center.shape), neighbor.new_empty(neighbor.shape), *parts


_forward_op = define(
    "edge_conv_norm(Tensor center, Tensor neighbor, Tensor index, Tensor? slope, Tensor? weight, Tensor? bias, "
    "Tensor? mean, Tensor? var, float number, float eps, bool opposite) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)
_backward_op = define(
    "edge_conv_norm_backward(Tensor grad, Tensor center, Tensor neighbor, Tensor index, Tensor? slope, "
    "Tensor? weight, Tensor extreme, Tensor mean, Tensor var, float number, float eps, bool batch) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
)


def _forward(
    center: Tensor, neighbor: Tensor, slope: Any, weight: Any, bias: Any, index: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return _forward_op(center, neighbor, index, slope, weight, bias, *others)


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    center, neighbor, slope, weight, _, index, mean, var, extreme, own_mean, own_var, number, eps, _ = arguments
    used = (own_mean, own_var) if mean is None else (mean, var)
    return _backward_op(grad, center, neighbor, index, slope, weight, extreme, *used, number, eps, mean is None)


def _formula(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    center, neighbor, slope, weight, _, index, mean, var, *_, number, eps, opposite = arguments
    factor, rows = slope_tensor(center, slope, number), as_rows(center, neighbor, index)
    batch = mean is None
    if batch:
        mean = edge_mean(*rows, factor)
        var = edge_variance(*rows, factor, mean)
    extreme = kept_edges(*rows, factor, _smallest(weight, opposite, mean))
    found = _gradients(grad, rows, factor, weight, extreme, mean, var, eps, batch)
    return found[0].view(center.shape), found[1].view(neighbor.shape), *found[2:]


_edge_conv_norm = differentiable(
    "edge_conv_norm",
    _forward,
    _backward,
    formula=_formula,
    vmap=one_by_one,
    outputs=5,
    kept=(1, 2, 3),
    constant=(1, 2, 3, 4),
)


def edge_conv_norm(
    center: Tensor,
    neighbor: Tensor,
    index: Tensor,
    *,
    negative_slope: float | Tensor = 0.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 1e-5,
    opposite: bool = False,
) -> NormalizedEdges:
    """Compute `edge_conv` and a batch norm of its edges; 0 for nodes without edges.

    Args:
        center: Centre terms of shape (M, C) or (B, M, C), or the rows of all clouds, (B M, C).
        neighbor: Neighbour terms of shape (N, C), (B, N, C) or (B N, C).
        index: Neighbours, int64 of shape (M, k) or (B, M, k).
        negative_slope: As in `edge_conv`.
        weight: Factor of each channel. Where it is negative, the smallest edge is kept.
        bias: Summand of each channel.
        mean: Mean to normalise with, without gradient; by default that of the edges.
        var: Biased variance, likewise.
        eps: Added to the variance.
        opposite: Keep the edge at the other end.
    """
    center, neighbor = promoted(center, neighbor)
    slope, number = split_slope(negative_slope, center)
    vectors = [_wide(t, center) for t in (weight, bias, mean, var)]
    output, _, new_mean, new_var, count = _edge_conv_norm(
        center, neighbor, slope, *vectors[:2], index, *vectors[2:], (number, float(eps), opposite)
    )
    return NormalizedEdges(output, new_mean, new_var, count)


def _wide(vector: Tensor | None, center: Tensor) -> Tensor | None:
    if vector is None or (vector.dtype == torch.float32 and center.dtype != torch.float64):
        return vector
    return vector.to(dtypes.accumulation(center))
