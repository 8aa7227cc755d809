"""knn at its limits: coordinates of any size, infinities, many equal distances, clouds without points, threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paper_layers import knn
from paper_layers.ops.knn import METRICS, _reference
from testing.cases import by_dtype
from tests.ops.test_knn import cloud, number_of_threads, ptr

INF = torch.inf


def assert_equals_reference(x: Tensor, y: Tensor | None = None, k: int = 16, inner: bool = False) -> None:
    """The same bits from the kernels, and without the points themselves."""
    index, distance = knn(x, y, k=k, metric="inner" if inner else "sqeuclidean")
    points = x if y is None else y
    expected = _reference(x[None], points[None], None, None, k, 1, inner, True)
    assert torch.equal(index, expected[0][0])
    assert torch.equal(distance, expected[1][0])
    if y is None:
        others = knn(x, k=k, metric="inner" if inner else "sqeuclidean", include_self=False)
        assert torch.equal(others[0], _reference(x[None], x[None], None, None, k, 1, inner, False)[0][0])


def halves(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a[: len(a) // 2], b[len(b) // 2 :]])


# Clouds whose distances are infinite, equal, or equal but for their last bits.
CLOUDS: dict[str, Callable[[Tensor], Tensor]] = {
    "one infinite": lambda x: x.index_fill(0, ptr(7), INF),
    "half infinite": lambda x: halves(x.index_fill(1, ptr(0), -INF), x),
    "infinite and NaN": lambda x: x.index_fill(0, ptr(3, 8), -INF).index_fill(0, ptr(5), torch.nan),
    "large": lambda x: x * 1e20,
    "small": lambda x: x * 1e-20,
    "large outlier": lambda x: x.index_fill(0, ptr(7), 1e30),
    "half small": lambda x: halves(x, x * 1e-30),
    "equal": lambda x: 0 * x + 0.5,
    "half zero": lambda x: halves(x, x * 0),
    "two places": lambda x: halves(0 * x, 0 * x + 1),
    "tight clusters": lambda x: halves(1e-6 * x, 1 + 1e-6 * x),
    "tighter clusters": lambda x: halves(1e-12 * x, 1 + 1e-12 * x),
    "signs": lambda x: x.sign(),
    "few": lambda x: x[:40].repeat(len(x) // 40 + 1, 1)[: len(x)],
}


# Few points and many, few channels and many, whose products serve one row or two.
@pytest.mark.parametrize(("points", "channels"), [(400, 3), (700, 3), (400, 8), (200, 33)])
@pytest.mark.parametrize("name", CLOUDS)
def test_unusual_clouds(name: str, points: int, channels: int) -> None:
    x = CLOUDS[name](cloud(points, channels))
    assert_equals_reference(x)
    assert_equals_reference(cloud(200, channels), x)
    assert_equals_reference(x, inner=True)


def seconds(query: Tensor, points: Tensor | None = None) -> float:
    start = time.process_time()
    knn(query, points, k=16)
    return time.process_time() - start


@pytest.mark.cpu_only
@pytest.mark.parametrize("channels", [3, 32])
def test_time_of_unusual_large_clouds(channels: int) -> None:
    """Little more than that of other clouds, where exact distances of all pairs take 20 to 300 times as long."""
    x = cloud(20000 if channels == 3 else 4000, channels)
    with number_of_threads(1):
        usual = min(seconds(x) for _ in range(3))
        for name, change in CLOUDS.items():
            if name not in ("signs", "half small", "tighter clusters"):
                assert seconds(change(x)) < 10 * usual + 0.05, name
        # Points that are equally far from all queries, though not equal to them.
        assert seconds(x, 0 * x) < 10 * usual + 0.05


@pytest.mark.cpu_only
def test_time_of_unusual_large_clouds_in_float64() -> None:
    """Most squares are infinite or zero."""
    x = cloud(20000, 3).double()
    with number_of_threads(1):
        usual = min(seconds(x) for _ in range(3))
        for scale in (1e155, 1e160, 1e200, 1e-170):
            assert seconds(x * scale) < 10 * usual + 0.05, scale


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("channels", [2, 3, 5, 20])
@pytest.mark.parametrize("scale", [1e153, 1e154, 3e154, 1e155, 1e160, 1e300, 1e-155, 1e-160, 1e-162, 1e-170, 1e-310])
def test_squares_beyond_float64(scale: float, channels: int, inner: bool) -> None:
    for points in (34, 300):
        x = cloud(points, channels).double() * scale
        assert_equals_reference(x, k=7, inner=inner)
        assert_equals_reference(x.index_fill(0, ptr(4), INF), k=points, inner=inner)
        assert_equals_reference(x.index_fill(0, ptr(9), torch.nan), halves(x * 1.1, x), k=points - 5, inner=inner)


@pytest.mark.parametrize("metric", METRICS)
def test_what_infinity_means(metric: str) -> None:
    """Infinitely far is last, minus infinity is first, NaN is nobody."""
    x = torch.tensor([[1.0, 0.5], [INF, 2.0], [torch.nan, 0.0], [-INF, 1.0], [INF, -INF], [0.5, 0.25]])
    index, distance = knn(x, k=6, metric=metric)
    expected = {
        "sqeuclidean": [[0, 5, 1, 3, 4, -1], [0, 3, 5, -1, -1, -1], [-1] * 6],
        "cosine": [[0, 5, -1, -1, -1, -1], [-1] * 6, [-1] * 6],
        "inner": [[1, 0, 5, 3, -1, -1], [0, 1, 5, 3, -1, -1], [-1] * 6],
    }[metric]
    assert index[:3].tolist() == expected
    assert (
        distance[0].isinf().tolist()
        == (torch.tensor(expected[0]) < 0).logical_or(torch.isin(torch.tensor(expected[0]), ptr(1, 3, 4))).tolist()
    )
    assert not distance.isnan().any()


@pytest.mark.parametrize("channels", [3, 8, 13])
@by_dtype
def test_equal_distances_in_all_searches(channels: int, dtype: torch.dtype) -> None:
    """One order of sums, so that what is equally far in one search is in all: few pairs, products, trees, float64."""
    x = (2 * cloud(2000, channels)).round() * torch.tensor([1.0, 0.1, 1 / 3, 0.7]).repeat(500)[:, None]
    x = x.to(dtype)
    for metric in ("sqeuclidean", "inner"):
        index, distance = knn(x, k=40, metric=metric)
        for row in range(0, 2000, 97):
            few = knn(x[row : row + 2], x, k=40, metric=metric)
            assert torch.equal(index[row : row + 2], few[0])
            assert torch.equal(distance[row : row + 2], few[1])
        some = _reference(x[None, :200], x[None], None, None, 40, 1, metric == "inner", True)
        assert torch.equal(index[:200], some[0][0])


@pytest.mark.parametrize("length", [1e-38, 1e-20, 1e-13, 1e19, 1e25, 1e37])
def test_cosine_of_any_length(length: float) -> None:
    x = cloud(100, 6)
    x[7] = 0
    scaled = x * torch.linspace(0.1, 1, 100)[:, None] * length
    distance = knn(scaled, k=100, metric="cosine")[1]
    exact = knn(x.double(), k=100, metric="cosine")[1]
    torch.testing.assert_close(distance, exact.float(), rtol=1e-4, atol=1e-6)
    assert torch.equal((2 * distance[7]).round(), torch.ones(100).index_fill(0, ptr(0), 0))


@pytest.mark.parametrize("length", [1e-20, 1e-13, 1e19, 1e25])
def test_gradient_of_cosine_of_any_length(length: float) -> None:
    """Inversely proportional to the length."""
    x, y = cloud(20, 6), cloud(30, 6)
    results = []
    for scale in (1.0, length):
        leaf = (x * scale).requires_grad_()
        results.append(torch.autograd.grad(knn(leaf, y, k=3, metric="cosine")[1].sum() * scale, leaf)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def gradients(x: Tensor, y: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, y) if t is not None]
    index, distance = knn(leaves[0], None if y is None else leaves[1], **options)
    weights = torch.sin(torch.arange(distance.shape[-1]))
    # Not through `distance` where there is no neighbour.
    return index, distance, *torch.autograd.grad((distance.where(index >= 0, 0) * weights).sum(), leaves)


@pytest.mark.cpu_only
@pytest.mark.parametrize("channels", [3, 10])
@by_dtype
def test_same_bits_for_any_number_of_threads(channels: int, dtype: torch.dtype) -> None:
    x, y = cloud(1500, channels).to(dtype), cloud(1100, channels).round().to(dtype)
    results = []
    for number in (1, 2, 3, 4, 8):
        with number_of_threads(number):
            found = gradients(x, k=9), gradients(x, y, k=20, metric="inner"), gradients(y, k=9, include_self=False)
            results.append([tensor for tensors in found for tensor in tensors])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.cpu_only
@pytest.mark.parametrize("channels", [3, 10])
@by_dtype
def test_same_bits_alone_and_in_a_batch(channels: int, dtype: torch.dtype) -> None:
    x, y = cloud(3, 210, channels).to(dtype), cloud(3, 130, channels).to(dtype)
    starts, other = ptr(0, 210, 420, 630), ptr(0, 130, 260, 390)
    for options in ({"k": 9}, {"k": 5, "dilation": 3, "metric": "inner"}, {"k": 7, "metric": "cosine"}):
        alone = [gradients(a, b, **options) for a, b in zip(x, y, strict=True)]
        dense = gradients(x, y, **options)
        ragged = gradients(x.flatten(0, 1), y.flatten(0, 1), ptr=starts, points_ptr=other, **options)
        for tensors in zip(*alone, dense, ragged, strict=True):
            *parts, together, flat = tensors
            assert torch.equal(torch.stack(parts), together)
            if flat.dtype != torch.int64:
                assert torch.equal(flat, together.flatten(0, 1))
        assert torch.equal(ragged[0] - other[:-1].repeat_interleave(210)[:, None], dense[0].flatten(0, 1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("query", "points"),
    [
        ((0, 3), (4, 3)),
        ((4, 3), (0, 3)),
        ((0, 3), (0, 3)),
        ((3, 0), (4, 0)),
        ((2, 0, 3), (2, 5, 3)),
        ((0, 4, 3), (0, 5, 3)),
        ((2, 4, 3), (2, 0, 3)),
    ],
)
def test_nothing(query: tuple[int, ...], points: tuple[int, ...], metric: str) -> None:
    """Clouds without points, queries or channels: neighbours that are not there, gradients of zeros."""
    x, y = torch.randn(query, requires_grad=True), torch.randn(points, requires_grad=True)
    index, distance = knn(x, y, k=6, metric=metric)
    assert index.shape == distance.shape == (*query[:-1], 6)
    there = min(6, points[-2])
    assert torch.equal(index, torch.tensor([*range(there), *[-1] * (6 - there)]).expand_as(index))
    assert not distance[..., :there].any()
    assert bool((distance[..., there:] == INF).all())
    first = torch.autograd.grad(distance.sum(), (x, y), create_graph=True)
    assert [t.shape for t in first] == [x.shape, y.shape]
    second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (x, y), allow_unused=True)
    assert not any(t.any() for t in (*first, *second) if t is not None)


@pytest.mark.slow_emulated
def test_no_channels_in_many_points() -> None:
    index, distance = knn(torch.zeros(30000, 0), k=3, include_self=False)
    assert index[:4].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert bool((index[4:] == ptr(0, 1, 2)).all())
    assert not distance.any()


@pytest.mark.tracing
def test_one_tensor_in_two_places_compiles() -> None:
    starts = ptr(0, 4, 30)

    def distances(c: Tensor) -> Tensor:
        return torch.cat(
            [
                knn(c, c, k=3)[1],
                knn(c[None], c[None], k=3, metric="cosine")[1][0],
                knn(c, k=3, ptr=starts)[1],
                knn(c, c, k=3, dilation=12, positions=starts, metric="inner", ptr=starts, points_ptr=starts)[1],
            ]
        )

    torch._dynamo.reset()
    compiled = torch.compile(distances, backend="aot_eager", fullgraph=True)
    actual, expected = (cloud(30, 5).requires_grad_() for _ in range(2))
    got, want = compiled(actual), distances(expected)
    torch.testing.assert_close(got, want)
    for result in (got, want):
        result.where(result.isfinite(), 0).sum().backward()
    torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.cpu_only
@pytest.mark.parametrize("channels", [3, 33])
def test_a_cloud_has_the_same_neighbours_alone(channels: int) -> None:
    sizes = (700, 40, 0, 150, 17, 300, 64, 1200)
    x, starts = cloud(sum(sizes), channels), ptr(0, *torch.tensor(sizes).cumsum(0).tolist())
    with number_of_threads(1):
        alone = [knn(part, k=9, dilation=2) for part in x.split(sizes)]
    offset = starts[:-1].repeat_interleave(starts.diff())[:, None]
    index = torch.cat([part.indices for part in alone])
    for threads in (1, 2, 3, 8):
        with number_of_threads(threads):
            found = knn(x, k=9, dilation=2, ptr=starts)
        assert torch.equal(found.indices, torch.where(index < 0, index, index + offset))
        assert torch.equal(found.distances, torch.cat([part.distances for part in alone]))
