"""The edge pass of EdgeConv: the op, its backward, and the function that users call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from paper_layers._core import checks, dtypes
from paper_layers._core.differentiable import differentiable
from paper_layers._core.library import define
from paper_layers._core.tracing import leaf
from paper_layers._core.vmap import one_by_one
from paper_layers.ops.flat_index import across_clouds, check_rows


class EdgeMax(NamedTuple):
    """The kept edge of each node, and the statistics of all edges.

    Attributes:
        output: Same shape and dtype as `center`.
        mean: Shape (C,), or (0,) where not wanted.
        var: The biased variance, likewise.
    """

    output: Tensor
    mean: Tensor
    var: Tensor


def _activate(z: Tensor, slope: Tensor) -> Tensor:
    """z above zero and slope z below; with a slope of zero also for infinities."""
    return torch.where(slope == 0, z.clamp(min=0), torch.where(z > 0, z, slope * z))


def _edges(center: Tensor, neighbor: Tensor, index: Tensor, column: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return one edge of each node, and where it exists, without a tensor of size M x k x C."""
    return center.to(dtype) + neighbor[index[:, column].clamp(min=0)].to(dtype), index[:, column, None] >= 0


def slope_tensor(center: Tensor, slope: Tensor | None, number: float) -> Tensor:
    """Return the slope of the activation below zero in the dtype of the computation."""
    return center.new_full((), number, dtype=dtypes.accumulation(center)) if slope is None else slope


def as_rows(center: Tensor, neighbor: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the terms of all clouds as rows, and the table of these rows; reads the data."""
    neighbor = neighbor.flatten(0, -2)
    if index.dim() == 3:
        index = across_clouds(index, len(neighbor) // max(1, len(index)))
    else:
        check_rows(index, len(neighbor))
    return center.flatten(0, -2), neighbor, index


def _reference(
    center: Tensor,
    neighbor: Tensor,
    index: Tensor,
    slope: Tensor | None,
    smallest: Tensor | None,
    number: float,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, factor = (*index.shape[:-1], center.shape[-1]), slope_tensor(center, slope, number)
    rows = as_rows(center, neighbor, index)
    best = kept_edges(*rows, factor, smallest).view(shape)
    if statistics:
        mean = edge_mean(*rows, factor)
        return best, mean, edge_variance(*rows, factor, mean)
    return best, factor.new_empty(0), factor.new_empty(0)


def _columns(index: Tensor, neighbor: Tensor) -> range:
    return range(index.shape[1] if len(neighbor) else 0)


def kept_edges(center: Tensor, neighbor: Tensor, index: Tensor, slope: Tensor, smallest: Tensor | None) -> Tensor:
    """Return each node's largest edge, or smallest; 0 without edges."""
    best = torch.zeros_like(center, dtype=slope.dtype)
    found = index.new_zeros(index.shape[0], 1, dtype=torch.bool)
    for column in _columns(index, neighbor):
        z, there = _edges(center, neighbor, index, column, slope.dtype)
        y = _activate(z, slope)
        better = y > best if smallest is None else torch.where(smallest, y < best, y > best)
        best = torch.where(there & (~found | better | (y.isnan() & ~best.isnan())), y, best)
        found = found | there
    return best.to(center.dtype)


def edge_mean(center: Tensor, neighbor: Tensor, index: Tensor, slope: Tensor) -> Tensor:
    """Return the mean of all edges; 0 without edges."""
    mean = center.new_zeros(center.shape[1], dtype=slope.dtype)
    count = (index >= 0).sum().clamp(min=1)
    for column in _columns(index, neighbor):
        z, there = _edges(center, neighbor, index, column, slope.dtype)
        mean = mean + _activate(z, slope).where(there, 0).sum(0) / count
    return mean


def edge_variance(center: Tensor, neighbor: Tensor, index: Tensor, slope: Tensor, mean: Tensor) -> Tensor:
    """Return the biased variance of all edges; 0 without edges."""
    var = torch.zeros_like(mean)
    count = (index >= 0).sum().clamp(min=1)
    for column in _columns(index, neighbor):
        z, there = _edges(center, neighbor, index, column, slope.dtype)
        var = var + (_activate(z, slope) - mean).square().where(there, 0).sum(0) / count
    return var


def _fake(
    center: Tensor, neighbor: Tensor, index: Tensor, slope: Any, smallest: Any, number: float, statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = dtypes.accumulation(center)
    mean, var = (center.new_empty(center.shape[-1] if statistics else 0, dtype=wide) for _ in range(2))
    return center.new_empty(*index.shape[:-1], center.shape[-1]), mean, var


def edge_gradients(
    grad: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    center: Tensor,
    neighbor: Tensor,
    index: Tensor,
    slope: Tensor,
    output: Tensor,
    mean: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the terms and of the slope, from those of the kept edges and of the statistics."""
    dtype = slope.dtype
    grad_center = torch.zeros_like(center, dtype=dtype)
    grad_neighbor = torch.zeros_like(neighbor, dtype=dtype)
    grad_slope = torch.zeros_like(slope)
    found = torch.zeros_like(center, dtype=torch.bool)
    count = (index >= 0).sum().clamp(min=1)
    for column in _columns(index, neighbor):
        z, there = _edges(center, neighbor, index, column, dtype)
        y = _activate(z, slope)
        rounded = y.to(center.dtype)
        chosen = there & ~found & ((rounded == output) | (rounded.isnan() & output.isnan()))
        found = found | chosen
        part = grad.to(dtype).where(chosen, 0)
        if len(mean):
            # With an infinite mean, no edge has a gradient.
            part = part + ((grad_mean + 2 * grad_var * (y - mean + (mean - mean))) / count).where(there, 0)
        slanted = part * torch.where(z > 0, 1, slope)
        grad_center = grad_center + slanted
        grad_neighbor = grad_neighbor.index_add(0, index[:, column].clamp(min=0), slanted)
        grad_slope = grad_slope + (part * z).where(there & ~(z > 0), 0).sum()
    return grad_center.to(center.dtype), grad_neighbor.to(neighbor.dtype), grad_slope


def _backward_reference(
    grad: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    center: Tensor,
    neighbor: Tensor,
    index: Tensor,
    slope: Tensor | None,
    output: Tensor,
    mean: Tensor,
    number: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, output = grad.flatten(0, -2), output.flatten(0, -2)
    rows, factor = as_rows(center, neighbor, index), slope_tensor(center, slope, number)
    grads = edge_gradients(grad, grad_mean, grad_var, *rows, factor, output, mean)
    return grads[0].view(center.shape), grads[1].view(neighbor.shape), grads[2]


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    center, neighbor = arguments[3:5]
    slope = center.new_empty((), dtype=dtypes.accumulation(center))
    return center.new_empty(center.shape), neighbor.new_empty(neighbor.shape), slope


_forward_op = define(
    "edge_conv(Tensor center, Tensor neighbor, Tensor index, Tensor? slope, Tensor? smallest, float number, "
    "bool statistics) -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)
_backward_op = define(
    "edge_conv_backward(Tensor grad, Tensor grad_mean, Tensor grad_var, Tensor center, Tensor neighbor, Tensor index, "
    "Tensor? slope, Tensor output, Tensor mean, float number) -> (Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
)


def _forward(
    center: Tensor,
    neighbor: Tensor,
    slope: Tensor | None,
    index: Tensor,
    smallest: Tensor | None,
    number: float,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_op(center, neighbor, index, slope, smallest, number, statistics)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *grads, center, neighbor, slope, index, _, output, mean, number, _ = arguments
    return _backward_op(*grads, center, neighbor, index, slope, output, mean, number)


def _formula(
    grad: Tensor, grad_mean: Tensor, grad_var: Tensor, center: Tensor, neighbor: Tensor, slope: Any, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    index, smallest, number, statistics = others
    factor, rows = slope_tensor(center, slope, number), as_rows(center, neighbor, index)
    output = kept_edges(*rows, factor, smallest).detach()
    mean = edge_mean(*rows, factor) if statistics else factor.new_empty(0)
    grads = edge_gradients(grad.flatten(0, -2), grad_mean, grad_var, *rows, factor, output, mean)
    return grads[0].view(center.shape), grads[1].view(neighbor.shape), grads[2]


_edge_conv = differentiable(
    "edge_conv", _forward, _backward, formula=_formula, vmap=one_by_one, outputs=3, exposed=(0, 1)
)


@leaf
def edge_conv(
    center: Tensor,
    neighbor: Tensor,
    index: Tensor,
    *,
    negative_slope: float | Tensor = 0.0,
    minimum_where: Tensor | None = None,
    return_statistics: bool = True,
) -> EdgeMax:
    r"""Maximum over each node's activated edges, and the mean and variance over all edges, without storing any edge.

    .. math:: y_{ij} = \sigma(a_i + b_j), \quad o_i = \max_{j \in \mathcal{N}(i)} y_{ij}, \quad
              \mu, v = \operatorname{mean}_{ij} y_{ij}, \operatorname{var}_{ij} y_{ij}

    The heart of EdgeConv in Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as CNNs?", ICCV 2019, section
    3.4: a linear layer on :math:`(x_i, x_j - x_i)` is :math:`a_i + b_j` with :math:`a = (W_1 - W_2) x` and
    :math:`b = W_2 x`. A batch norm of the edges needs their statistics and, as it is monotonic, only the largest edge
    of each node, or the smallest where its weight is negative. `paper_layers.deep_gcn.EdgeConv` is built on it.

    Args:
        center: Centre terms a, of shape (M, C) or (B, M, C); float32, float64, bfloat16 or float16.
        neighbor: Neighbour terms b, of shape (N, C) or (B, N, C).
        index: Neighbours, int64 of shape (M, k) or (B, M, k), the rows of `neighbor` (in (B, N, C), of its own cloud);
            -1 is no neighbour, and any other number an error.
        negative_slope: The activation is :math:`\sigma(z) = \max(z, 0) + s \min(z, 0)`: 0 is ReLU, 1 none. A Tensor of
            one element is differentiable, as in PReLU.
        minimum_where: Bool of shape (C,): the channels whose smallest edge is kept in place of the largest.
        return_statistics: If False, mean and variance are empty.

    Returns:
        The kept edges, of the shape and dtype of `center` and 0 where a node has no neighbours; the mean and the biased
        variance of all edges, of shape (C,), float32 (float64 for float64) and 0 where there are no edges. Of equal
        edges the first takes the gradient. A channel with an infinite edge has a mean that is not finite and a variance
        of NaN, and the statistics' gradient is NaN in all of its edges.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit.
        RuntimeError: An index is out of range (on CUDA, as in torch's own indexing, that stops the device's work with
            an assertion).

    Example:
        >>> import torch, paper_layers
        >>> x = torch.randn(2, 1024, 64)
        >>> index, _ = paper_layers.knn(x, k=16)
        >>> w1, w2 = torch.randn(2, 32, 64)
        >>> output, mean, var = paper_layers.edge_conv(x @ (w1 - w2).T, x @ w2.T, index)
        >>> output.shape, mean.shape, var.shape
        (torch.Size([2, 1024, 32]), torch.Size([32]), torch.Size([32]))
    """
    checks.floating("center", center)
    checks.floating("neighbor", neighbor)
    checks.same_device("neighbor", neighbor, "center", center)
    sizes, others = center.shape, neighbor.shape
    if len(sizes) not in (2, 3):
        checks.shape("center", center, ("M", "C"), ("B", "M", "C"))
    channels = sizes[-1]
    if len(others) != len(sizes) or others[-1] != channels or others[:-2] != sizes[:-2]:
        checks.shape("neighbor", neighbor, (*sizes[:-2], "N", channels))
    index = checks.neighbors("index", index, *sizes[:-1])
    checks.same_device("index", index, "center", center)
    if minimum_where is not None:
        if not isinstance(minimum_where, Tensor) or minimum_where.dtype != torch.bool:
            got = minimum_where.dtype if isinstance(minimum_where, Tensor) else type(minimum_where).__name__
            raise TypeError(f"minimum_where: expected a bool Tensor, got {got}")
        checks.shape("minimum_where", minimum_where, (channels,))
        checks.same_device("minimum_where", minimum_where, "center", center)

    center, neighbor = promoted(center, neighbor)
    slope, number = split_slope(negative_slope, center)
    return EdgeMax(*_edge_conv(center, neighbor, slope, index, minimum_where, (number, bool(return_statistics))))


def promoted(center: Tensor, neighbor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the terms in one dtype."""
    if center.dtype == neighbor.dtype:
        return center, neighbor
    dtype = torch.promote_types(center.dtype, neighbor.dtype)
    return center.to(dtype), neighbor.to(dtype)


def split_slope(negative_slope: float | Tensor, center: Tensor) -> tuple[Tensor | None, float]:
    """Return the slope as a tensor, which has a gradient, or as a number."""
    if not isinstance(negative_slope, Tensor):
        return None, float(checks.number("negative_slope", negative_slope))
    if negative_slope.numel() != 1:
        raise ValueError(f"negative_slope: expected one element, got shape {tuple(negative_slope.shape)}")
    checks.same_device("negative_slope", negative_slope, "center", center)
    return negative_slope.to(dtypes.accumulation(center)).reshape(()), 0.0
