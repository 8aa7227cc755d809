"""Exact dilated k-nearest neighbours: the op, the gradient of its distances, and the function that users call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers._core import checks, dtypes
from paper_layers._core.differentiable import differentiable
from paper_layers._core.library import define
from paper_layers._core.ragged import all_batch_starts, check_starts
from paper_layers._core.tracing import leaf
from paper_layers._core.vmap import one_by_one
from paper_layers.ops.flat_index import check_rows, flat_index

METRICS = ("sqeuclidean", "cosine", "inner")
_CHUNK = 1 << 22  # Elements of the reference's largest tensor.


class Neighbors(NamedTuple):
    """Neighbours of each query, ordered by distance.

    Attributes:
        indices: int64 of shape (B, M, k) or (M, k); -1 for no neighbour.
        distances: The same shape; infinite for no neighbour.
    """

    indices: Tensor
    distances: Tensor


class _Cloud(NamedTuple):
    """The rows of a cloud's queries and points, and the offset of its indices."""

    query: slice
    points: slice
    offset: int


def _check_ptr(query: Tensor, points: Tensor, query_ptr: Tensor, points_ptr: Tensor) -> tuple[list[int], list[int]]:
    return check_starts("ptr", query_ptr, query.shape[0]), check_starts("points_ptr", points_ptr, points.shape[0])


def _clouds(query: Tensor, points: Tensor, query_ptr: Tensor | None, points_ptr: Tensor | None) -> Iterator[_Cloud]:
    """Yield the clouds of flattened rows. Indices count within the cloud for (B, N, C), in all rows otherwise."""
    if query_ptr is None or points_ptr is None:
        m, n = query.shape[1], points.shape[1]
        for b in range(query.shape[0] if m else 0):
            yield _Cloud(slice(b * m, b * m + m), slice(b * n, b * n + n), 0)
        return
    q, p = _check_ptr(query, points, query_ptr, points_ptr)
    for b in range(len(q) - 1):
        yield _Cloud(slice(q[b], q[b + 1]), slice(p[b], p[b + 1]), p[b])


def _pairwise(query: Tensor, points: Tensor, inner: bool) -> Tensor:
    """Return distances (M, N) in float64, from differences, so that nothing cancels.

    All implementations add channels in this order, so that equal distances are equal in each of them: four sums, over
    channels 0, 4, 8 ..., over 1, 5, 9 ... and so on, come after the channels beyond a multiple of four.
    """
    query, points = query.double()[:, None], points.double()
    terms = query * points if inner else (query - points).square()
    whole = terms.shape[-1] // 4 * 4
    total = terms.new_zeros(terms.shape[:-1])
    for channel in range(whole, terms.shape[-1]):
        total = total + terms[..., channel]
    sums = terms[..., : min(whole, 4)]
    for channel in range(4, whole, 4):
        sums = sums + terms[..., channel : channel + 4]
    for part in sums.unbind(-1):
        total = total + part
    return -total if inner else total


def _reference(
    query: Tensor,
    points: Tensor,
    query_ptr: Tensor | None,
    points_ptr: Tensor | None,
    k: int,
    dilation: int,
    inner: bool,
    include_self: bool,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, targets = query.flatten(0, -2), points.flatten(0, -2)
    index = torch.full((rows.shape[0], k), -1, device=query.device)
    distance = torch.full((rows.shape[0], k), torch.inf, dtype=torch.float64, device=query.device)
    wanted = torch.arange(0, k * dilation, dilation, device=query.device) if positions is None else positions
    for cloud in _clouds(query, points, query_ptr, points_ptr):
        mine, others = rows[cloud.query], targets[cloud.points]
        step = max(1, _CHUNK // max(1, others.numel()))
        for start in range(0, mine.shape[0], step):
            found = _pairwise(mine[start : start + step], others, inner)
            if not include_self:
                found.diagonal(start).fill_(torch.nan)
            # Sorting puts NaN last; a point at distance NaN is no neighbour.
            ordered, order = found.sort(dim=1, stable=True)
            ordered, order = (t[:, wanted[wanted < t.shape[1]]] for t in (ordered, order))
            valid = ~ordered.isnan()
            block = slice(cloud.query.start + start, cloud.query.start + start + found.shape[0]), slice(order.shape[1])
            index[block] = torch.where(valid, order + cloud.offset, -1)
            distance[block] = torch.where(valid, ordered, torch.inf)
    shape = (*query.shape[:-1], k)
    return index.view(shape), distance.to(dtypes.accumulation(query)).view(shape)


def _fake(query: Tensor, points: Tensor, query_ptr: Any, points_ptr: Any, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:-1], k)
    return query.new_empty(shape, dtype=torch.int64), query.new_empty(shape, dtype=dtypes.accumulation(query))


def _backward_reference(
    grad: Tensor, query: Tensor, points: Tensor, index: Tensor, inner: bool
) -> tuple[Tensor, Tensor]:
    flat = index if index.dim() == 2 else flat_index(index, points.shape[1])
    weight = grad.flatten(0, -2).masked_fill(flat < 0, 0)
    flat = flat.clamp(min=0)
    rows, targets = query.flatten(0, -2).to(weight.dtype), points.flatten(0, -2).to(weight.dtype)
    grad_rows, grad_targets = torch.zeros_like(rows), torch.zeros_like(targets)
    if targets.shape[0] > 0:
        for column in range(flat.shape[1]):  # One neighbour at a time, so that no tensor has size M x k x C.
            w, j = weight[:, column, None], flat[:, column]
            if inner:
                grad_rows, grad_targets = grad_rows - w * targets[j], grad_targets.index_add(0, j, -w * rows)
            else:
                difference = 2 * w * (rows - targets[j])
                grad_rows, grad_targets = grad_rows + difference, grad_targets.index_add(0, j, -difference)
    return grad_rows.to(query.dtype).view(query.shape), grad_targets.to(points.dtype).view(points.shape)


def _checked_backward(grad: Tensor, query: Tensor, points: Tensor, index: Tensor, inner: bool) -> tuple[Tensor, Tensor]:
    check_rows(index, points.shape[-2])
    return _backward_reference(grad, query, points, index, inner)


def _backward_fake(grad: Tensor, query: Tensor, points: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), points.new_empty(points.shape)


def _backward_of_grad(
    query: Tensor, points: Tensor, index: Tensor, inner: bool, to_query: Tensor, to_points: Tensor
) -> Tensor:
    """Return the gradient of `_backward_reference`'s weighted results with respect to `grad`."""
    flat = index if index.dim() == 2 else flat_index(index, points.shape[1])
    dtype = dtypes.accumulation(query)
    rows, to_rows = (t.flatten(0, -2).to(dtype) for t in (query, to_query))
    targets, to_targets = (t.flatten(0, -2).to(dtype) for t in (points, to_points))
    if targets.shape[0] == 0:
        return (rows.sum() + to_rows.sum()) * 0 + torch.zeros(index.shape, dtype=dtype, device=index.device)
    columns = []
    for column in flat.clamp(min=0).unbind(1):
        if inner:
            terms = -(targets[column] * to_rows + rows * to_targets[column])
        else:
            terms = 2 * (rows - targets[column]) * (to_rows - to_targets[column])
        columns.append(terms.sum(-1))
    return torch.stack(columns, 1).masked_fill(flat < 0, 0).view(index.shape)


def _flops(query: Sequence[int], points: Sequence[int], query_ptr: Any, points_ptr: Any, *_: Any) -> int:
    """Count the products of all pairs in each cloud; of ragged clouds, as if they were of one size."""
    clouds = 1 if points_ptr is None else max(1, points_ptr[0] - 1)
    return 2 * math.prod(query) * points[-2] // clouds


_knn_op = define(
    "knn(Tensor query, Tensor points, Tensor? query_ptr, Tensor? points_ptr, int k, int dilation, bool inner, "
    "bool include_self, Tensor? positions=None) -> (Tensor, Tensor)",
    _reference,
    _fake,
    flops=_flops,
)
_backward_op = define(
    "knn_backward(Tensor grad, Tensor query, Tensor points, Tensor index, bool inner) -> (Tensor, Tensor)",
    _checked_backward,
    _backward_fake,
)


def _forward(query: Tensor, points: Tensor, query_ptr: Any, points_ptr: Any, positions: Any, *settings: Any) -> Any:
    try:
        return _knn_op(query, points, query_ptr, points_ptr, *settings, positions)
    except RuntimeError:  # The kernel checks the starts; this only finds the message.
        if query_ptr is not None and points_ptr is not None and query_ptr.is_cpu:
            _check_ptr(query, points, query_ptr, points_ptr)
        raise


def _backward(grad: Tensor, query: Tensor, points: Tensor, index: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    _, _, inner, _ = settings
    return _backward_op(grad, query, points, index, inner)


def _second_order(
    along: tuple[Tensor, Tensor], grad: Tensor, query: Tensor, points: Tensor, index: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    # Distances are of second order: the gradient is linear in the points, and its own gradient the same function.
    to_grad = _backward_of_grad(query, points, index, settings[2], *along)
    return to_grad, *_backward_reference(grad, *along, index, settings[2])


# Clouds may be ragged, so each element is a call.
_knn = differentiable(
    "knn",
    _forward,
    _backward,
    second=_second_order,
    vmap=one_by_one,
    outputs=2,
    saved=(0, 1),
    kept=(0,),
    constant=(0,),
)


@leaf
def knn(
    query: Tensor,
    points: Tensor | None = None,
    *,
    k: int,
    dilation: int = 1,
    positions: Tensor | None = None,
    batch: Tensor | None = None,
    points_batch: Tensor | None = None,
    ptr: Tensor | None = None,
    points_ptr: Tensor | None = None,
    metric: str = "sqeuclidean",
    include_self: bool = True,
) -> Neighbors:
    r"""Find the k nearest points of each query, or every `dilation`-th of the ``k * dilation`` nearest.

    .. math:: d(x, y) = \lVert x - y \rVert^2

    The dilated k-NN of Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as CNNs?", ICCV 2019, section 3.3:
    positions 0, dilation, 2 dilation, ... of the neighbours, ordered by distance, then by index. Exact, at any
    distance of the cloud from the origin: candidates are compared by differences in float64. The distances are
    differentiable, the indices are not.

    Infinite coordinates, and sums beyond float64, give infinite distances, which are the farthest (for "inner", minus
    infinity is the nearest). A point at distance NaN, as from inf - inf or a NaN coordinate, is no neighbour.
    This holds for every metric.

    Args:
        query: Features of shape (B, M, C), or (M, C) of one cloud or, with `batch` or `ptr`, of several; float32,
            float64, bfloat16 or float16.
        points: The points to search, of shape (B, N, C) or (N, C); default the queries themselves.
        k: Neighbours of each query.
        dilation: Keep every `dilation`-th neighbour.
        positions: Which of the ``k * dilation`` nearest to keep in place of every `dilation`-th: ascending numbers
            from 0, int64 of shape (k,).
        batch: The cloud of each query, int64 of shape (M,) in ascending order, as in PyG. Reads the number of clouds
            from the data; under `torch.compile` use `ptr`.
        points_batch: The same for `points`.
        ptr: Where each cloud starts, int64 of shape (B + 1,), from 0 to M.
        points_ptr: The same for `points`.
        metric: "sqeuclidean"; "cosine", :math:`1 - \cos(x, y)`, where a zero vector has distance 1/2 to every
            non-zero vector; or "inner", the inner product with its sign changed.
        include_self: Whether a point is its own neighbour, where the queries are the points.

    Returns:
        Indices, int64, and distances, float32 (float64 for float64), of shape (B, M, k) or (M, k). The indices count
        within the cloud for (B, N, C), and in the rows of `points` for (N, C). Where a cloud has too few points the
        index is -1 and the distance infinite.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, sizes, devices or values do not fit.

    Example:
        >>> import torch, paper_layers
        >>> x = torch.randn(2, 1024, 64)
        >>> index, distance = paper_layers.knn(x, k=16, dilation=4)
        >>> index.shape, distance.shape
        (torch.Size([2, 1024, 16]), torch.Size([2, 1024, 16]))
    """
    checks.floating("query", query)
    if query.dim() not in (2, 3):
        checks.shape("query", query, ("B", "M", "C"), ("M", "C"))
    if points is None or points is query:
        targets, dtype = query, query.dtype
    else:
        targets = points
        checks.floating("points", targets)
        checks.same_device("points", targets, "query", query)
        checks.shape("points", targets, (*query.shape[:-2], "N", query.shape[-1]))
        dtype = torch.promote_types(query.dtype, targets.dtype)
    k = checks.integer("k", k, 1)
    dilation = checks.integer("dilation", dilation, 1)
    if positions is not None:
        positions = checks.int64("positions", positions, k)
        checks.same_device("positions", positions, "query", query)
    checks.choice("metric", metric, METRICS)
    if not include_self and points is not None:
        raise ValueError("include_self: expected True where points are given, got False")
    starts: tuple[Tensor | None, Tensor | None] = None, None
    if not (batch is None and ptr is None and points_batch is None and points_ptr is None):
        starts = _starts(query, targets, points is None, batch, points_batch, ptr, points_ptr)

    if metric == "cosine":
        dtype = torch.promote_types(dtype, torch.float32)
        same = targets is query
        query = _unit(query.to(dtype))
        targets = query if same else _unit(targets.to(dtype))
    if targets is not query:
        query, targets = query.to(dtype), targets.to(dtype)
    single = starts[0] is None and query.dim() == 2
    if single:
        query, targets = query.unsqueeze(0), targets.unsqueeze(0)
    settings = (k, dilation, metric == "inner", bool(include_self))
    index, distance = _knn(query, targets, *starts, positions, settings)
    if metric == "cosine":
        distance = distance / 2  # |x - y|^2 / 2 = 1 - x.y for vectors of length one
    return Neighbors(index.squeeze(0), distance.squeeze(0)) if single else Neighbors(index, distance)


def _unit(rows: Tensor) -> Tensor:
    """Scale rows to length one; rows of zeros stay as they are."""
    if rows.shape[-1] == 0:
        return rows
    # So that the norm neither overflows nor underflows; ordinary rows are divided by 1.
    largest = torch.linalg.vector_norm(rows.detach(), torch.inf, -1, keepdim=True)
    return F.normalize(rows / (largest / largest.clamp(1e-10, 1e15) + (largest == 0)), dim=-1)


def _starts(
    query: Tensor,
    points: Tensor,
    same: bool,
    batch: Tensor | None,
    points_batch: Tensor | None,
    ptr: Tensor | None,
    points_ptr: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the starts of the clouds of queries and points, from `batch` or `ptr`."""
    named = {"batch": batch, "points_batch": points_batch, "ptr": ptr, "points_ptr": points_ptr}
    given = {name: value for name, value in named.items() if value is not None}
    for name, value in given.items():
        given[name] = checks.numbers(name, value)
        checks.same_device(name, value, "query", query)
        if query.dim() != 2:
            raise ValueError(f"{name}: expected None for query of shape (B, M, C), got a Tensor")
        if same and name.startswith("points"):
            raise ValueError(f"{name}: expected None where no points are given, got a Tensor")
    if any("batch" in name for name in given) and any("ptr" in name for name in given):
        raise ValueError(f"ptr: expected either batch or ptr, got both: {', '.join(given)}")
    names = ("batch", "points_batch") if any("batch" in name for name in given) else ("ptr", "points_ptr")
    if same:
        names = (names[0], names[0])
    for name in names:
        if name not in given:
            raise ValueError(f"{name}: expected a Tensor beside {next(iter(given))}, got None")
    first, second = (given[name] for name in names)
    if names[0] == "ptr":
        if len(first) == 0 or first.shape != second.shape:
            expected = f"{tuple(first.shape)}, as of ptr" if len(first) else "(B + 1,)"
            raise ValueError(f"{names[1]}: expected shape {expected}, got {tuple(second.shape)}")
        return first, second
    if first is second and len(query) == len(points):
        return (all_batch_starts((names[0], first, query))[0],) * 2
    of_queries, of_points = all_batch_starts((names[0], first, query), (names[1], second, points))
    return of_queries, of_points
