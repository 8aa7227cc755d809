from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paper_layers import knn
from testing.battery import OpBattery
from testing.cases import Case, assert_close, by_dtype, drawn


def neighbours(query: Tensor, points: Tensor | None = None, k: int = 16, **options: Any) -> tuple[Tensor, Tensor]:
    """Find the neighbours cloud by cloud and query by query, in float64 and with Python's own sorting."""
    dilation, metric = options.get("dilation", 1), options.get("metric", "sqeuclidean")
    positions = options.get("positions", torch.arange(0, k * dilation, dilation)).tolist()
    targets = query if points is None else points
    if query.dim() == 3:
        parts = [
            neighbours(q, None if points is None else p, k, **options) for q, p in zip(query, targets, strict=True)
        ]
        index, distance = (torch.stack(t) for t in zip(*parts, strict=True))
        return index, distance
    ptr = options.get("ptr", torch.tensor([0, len(query)]))
    points_ptr = ptr if points is None else options.get("points_ptr", torch.tensor([0, len(targets)]))
    cloud_of = torch.searchsorted(ptr, torch.arange(len(query)), right=True) - 1
    index = torch.full((len(query), k), -1)
    for i, q in enumerate(query.detach().double()):
        start, end = points_ptr[cloud_of[i]], points_ptr[cloud_of[i] + 1]
        cloud = targets.detach().double()[start:end]
        if metric == "sqeuclidean":
            distance = (cloud - q).square().sum(1)
        elif metric == "cosine":
            distance = -F.cosine_similarity(cloud, q[None])
        else:
            distance = -(cloud * q).sum(1)
        order = [(d, j) for j, d in enumerate(distance.tolist(), int(start)) if d == d]
        order = sorted(pair for pair in order if options.get("include_self", True) or pair[1] != i)
        found = [order[rank][1] for rank in positions if rank < len(order)]
        index[i, : len(found)] = torch.tensor(found, dtype=torch.int64)
    return index, distances(query, targets, index, metric)


def distances(query: Tensor, points: Tensor, index: Tensor, metric: str) -> Tensor:
    """Differentiable distances to given neighbours in float64; infinite where there is none."""
    if len(points) == 0:
        return (index.double() + 0 * (query.nan_to_num(0, 0, 0).sum() + points.sum())).fill_(torch.inf)
    there = index[..., None] >= 0
    pairs = points.double()[index.clamp(min=0)].where(there, 0)
    centers = query.double()[:, None].where(there, 0)
    if metric == "sqeuclidean":
        result = (centers - pairs).square().sum(-1)
    elif metric == "cosine":
        result = 1 - F.cosine_similarity(centers, pairs, dim=-1)
    else:
        result = -(centers * pairs).sum(-1)
    return result.masked_fill(index < 0, torch.inf)


def cloud(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    channels = draw(st.sampled_from([0, 1, 2, 3, 4, 9, 33]))
    clouds = draw(st.integers(1, 3))
    sizes = [draw(st.sampled_from([0, 1, 2, 30, 65, 150, 200])) for _ in range(clouds)]
    other = [draw(st.sampled_from([0, 1, 30, 65, 150, 200])) for _ in range(clouds)]
    form = draw(st.sampled_from(["dense", "ragged", "one"]))
    if form != "ragged":
        sizes, other = sizes[:1] * (clouds if form == "dense" else 1), other[:1] * (clouds if form == "dense" else 1)
    separate = draw(st.booleans())
    options: dict[str, Any] = {"k": draw(st.integers(1, 40)), "dilation": draw(st.integers(1, 5))}
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        options["positions"] = torch.randperm(options["k"] * options["dilation"], generator=generator)[
            : options["k"]
        ].sort()[0]
    options["metric"] = draw(st.sampled_from(["sqeuclidean", "sqeuclidean", "inner"]))
    if not separate:
        options["include_self"] = draw(st.booleans())
    seed = draw(st.integers(0, 2**20))
    # Ordinary clouds, far from the origin, of many ties, coincident, on a line, with far outliers, with NaN.
    change = draw(
        st.sampled_from(
            [
                lambda x: x,
                lambda x: x,
                lambda x: x if options["metric"] == "inner" else x + 1000,
                lambda x: (2 * x).round(),
                lambda x: 0 * x + 0.5,
                lambda x: x[..., :1].expand_as(x),
                lambda x: torch.where(x > 2.5, x * 50, x),
                lambda x: torch.where(x > 2.5, torch.nan, x),
            ]
        )
    )
    tensors = [change(cloud(sum(n), channels, seed=seed + i)) for i, n in enumerate([sizes, other][: 1 + separate])]
    if form == "dense":
        tensors = [t.unflatten(0, (clouds, n[0])) for t, n in zip(tensors, (sizes, other), strict=False)]
        if draw(st.booleans()):
            tensors = [t.mT.contiguous().mT for t in tensors]
    elif form == "ragged":
        ptrs = [torch.tensor([0, *n]).cumsum(0) for n in (sizes, other)]
        options["ptr"] = ptrs[0]
        if separate:
            options["points_ptr"] = ptrs[1]
    return Case(tuple(tensors), options)


def call(**change: Any) -> Any:
    arguments = {"query": cloud(2, 10, 3), "k": 3, **change}
    return lambda: knn(**arguments)


def ptr(*starts: int) -> Tensor:
    return torch.tensor(starts)


class TestKNN(OpBattery):
    function = staticmethod(lambda *tensors, **options: knn(*tensors, **options)[1])
    formula = staticmethod(lambda *tensors, **options: neighbours(*tensors, **options)[1])
    cases = staticmethod(cases)
    ops = {"knn": torch.ops.paper_layers.knn.default, "knn_backward": torch.ops.paper_layers.knn_backward.default}  # noqa: RUF012
    grad_scale = 32.0  # sums over many neighbours
    bad_inputs = {  # noqa: RUF012
        "rank": (call(query=cloud(4)), ValueError, r"query: expected shape .*got \(4,\)"),
        "integers": (call(query=torch.ones(2, 10, 3, dtype=torch.int64)), TypeError, "query: .*torch.int64"),
        "not a tensor": (call(points=3.0), TypeError, "points: expected a Tensor, got float"),
        "channels": (call(points=cloud(2, 9, 4)), ValueError, r"points: expected shape \(2, N, 3\), got \(2, 9, 4\)"),
        "clouds": (call(points=cloud(3, 9, 3)), ValueError, r"points: expected shape \(2, N, 3\), got \(3, 9, 3\)"),
        "device": (call(points=cloud(2, 9, 3).to("meta")), ValueError, "points: .*cpu, got meta"),
        "k zero": (call(k=0), ValueError, "k: expected at least 1, got 0"),
        "k type": (call(k=2.0), TypeError, "k: expected an int, got 2.0"),
        "dilation": (call(dilation=0), ValueError, "dilation: expected at least 1, got 0"),
        "positions type": (call(k=2, positions=[0, 1]), TypeError, "positions: expected an int64 Tensor, got list"),
        "positions shape": (
            call(k=2, positions=ptr(0, 1, 2)),
            ValueError,
            r"positions: expected shape \(2,\), got \(3,\)",
        ),
        "positions order": (
            call(k=2, dilation=2, positions=ptr(1, 1)),
            RuntimeError,
            r"positions: .*from 0 to 3, got \(1, 1\)",
        ),
        "positions range": (
            call(k=2, dilation=2, positions=ptr(1, 4)),
            RuntimeError,
            r"positions: .*from 0 to 3, got \(1, 4\)",
        ),
        "metric": (call(metric="l1"), ValueError, "metric: expected one of sqeuclidean, cosine, inner, got 'l1'"),
        "self": (call(points=cloud(2, 9, 3), include_self=False), ValueError, "include_self: expected True"),
        "dense with ptr": (call(ptr=ptr(0, 10)), ValueError, "ptr: expected None"),
        "ptr type": (
            call(query=cloud(9, 3), ptr=[0, 9]),
            TypeError,
            "ptr: expected an int64 Tensor of one dimension, got list",
        ),
        "ptr dtype": (
            call(query=cloud(9, 3), ptr=ptr(0, 9).short()),
            TypeError,
            "ptr: expected an int64 .*got torch.int16",
        ),
        "ptr and batch": (
            call(query=cloud(9, 3), ptr=ptr(0, 9), batch=torch.zeros(9, dtype=torch.int64)),
            ValueError,
            "either batch or ptr, got both",
        ),
        "one ptr": (call(query=cloud(9, 3), points=cloud(8, 3), ptr=ptr(0, 9)), ValueError, "points_ptr: expected"),
        "points_ptr alone": (call(query=cloud(9, 3), points_ptr=ptr(0, 9)), ValueError, "points_ptr: expected None"),
        "ptr shape": (
            call(query=cloud(9, 3), points=cloud(8, 3), ptr=ptr(0, 9), points_ptr=ptr(0, 4, 8)),
            ValueError,
            r"points_ptr: expected shape \(2,\), as of ptr, got \(3,\)",
        ),
        "batch shape": (
            call(query=cloud(9, 3), batch=ptr(0, 0)),
            ValueError,
            r"batch: expected shape \(9,\), got \(2,\)",
        ),
        "batch order": (call(query=cloud(3, 3), batch=ptr(0, 1, 0)), ValueError, "batch: expected .* ascending"),
        "batch negative": (call(query=cloud(3, 3), batch=ptr(-1, 0, 1)), ValueError, "batch: expected numbers from 0"),
    }

    @staticmethod
    def output_dtype(dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    @staticmethod
    def fixed_cases() -> list[Case]:
        return [
            Case((cloud(2, 12, 3), cloud(2, 9, 3)), {"k": 3, "dilation": 2, "positions": ptr(0, 2, 5)}),
            Case((cloud(2, 8, 5),), {"k": 4, "include_self": False}),
            Case(
                (cloud(9, 4), cloud(8, 4)), {"k": 3, "metric": "inner", "ptr": ptr(0, 4, 9), "points_ptr": ptr(0, 3, 8)}
            ),
        ]

    def alias_cases(self) -> list[Case]:
        starts = {"ptr": torch.tensor([0, 3, 8]), "points_ptr": torch.tensor([0, 4, 8])}
        return [Case((cloud(2, 8, 5), cloud(2, 8, 5)), {"k": 4}), Case((cloud(8, 3), cloud(8, 3)), {"k": 2, **starts})]

    @staticmethod
    def op_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
        query, points = case.tensors[0], case.tensors[-1]
        inner = case.options.get("metric") == "inner"
        starts = (case.options.get("ptr"), case.options.get("points_ptr", case.options.get("ptr")))
        options = (case.options["k"], case.options.get("dilation", 1), inner, case.options.get("include_self", True))
        options += (case.options.get("positions"),)
        index, distance = torch.ops.paper_layers.knn(query, points, *starts, *options)
        return {
            "knn": (query, points, *starts, *options),
            "knn_backward": (distance.nan_to_num(posinf=1.0), query, points, index, inner),
        }


@by_dtype
def test_indices(dtype: torch.dtype) -> None:
    """The same neighbours in the same order, ties and all."""

    @drawn
    @given(case=cases())
    def check(case: Case) -> None:
        tensors = case.to(dtype).tensors
        assert torch.equal(knn(*tensors, **case.options)[0], neighbours(*tensors, **case.options)[0])

    check()


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e5])
def test_far_from_the_origin(channels: int, offset: float) -> None:
    """A cloud many of its extents away, where |x|^2 - 2 x.y + |y|^2 loses all digits."""
    x = cloud(1500, channels) + offset
    assert torch.equal(knn(x, k=20)[0], neighbours(x, k=20)[0])
    assert not knn(x, k=1)[1].any()


@pytest.mark.parametrize("channels", [3, 8])
def test_degenerate_clouds(channels: int) -> None:
    """All points equal; on a line; one far outlier; a hundred copies of each; on a grid."""
    x = cloud(600, channels)
    outlier = x.clone()
    outlier[7] = 1e7
    line = x[:, :1] * torch.ones(channels)
    for points in (torch.ones(600, channels), line, outlier, x[:6].repeat(100, 1), (2 * x).round()):
        for options in ({"k": 12}, {"k": 5, "dilation": 3, "include_self": False}):
            assert torch.equal(knn(points, **options)[0], neighbours(points, **options)[0])


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-310, 1e-200, 1e300])
@pytest.mark.parametrize("channels", [2, 20])
def test_no_distance_is_too_large_or_small(channels: int, scale: float) -> None:
    x = cloud(300, channels).to(torch.float32 if 1e-40 < scale < 1e40 else torch.float64) * scale
    assert torch.equal(knn(x, k=9)[0], neighbours(x, k=9)[0])


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_infinite_coordinates(channels: int) -> None:
    """Infinitely far is last; what has no distance, as inf - inf, is nobody's neighbour."""
    x = cloud(200, channels)
    x[5], x[9], x[11, 0] = torch.inf, -torch.inf, torch.nan
    for options in ({"k": 199}, {"k": 12, "metric": "inner"}):
        index, distance = knn(x, **options)
        expected = neighbours(x, **options)
        assert torch.equal(index, expected[0])
        assert_close(distance, expected[1], torch.float32)


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize(("k", "dilation"), [(432, 1), (16, 27), (1000, 2)])
def test_many_neighbours(channels: int, k: int, dilation: int) -> None:
    x = cloud(1100, channels)
    index, distance = knn(x, k=k, dilation=dilation)
    expected = neighbours(x[:40], x, k, dilation=dilation)
    assert torch.equal(index[:40], expected[0])
    assert_close(distance[:40], expected[1], torch.float32)


@pytest.mark.cpu_only
@pytest.mark.parametrize("k", [100, 700])
@by_dtype
def test_many_neighbours_in_large_clouds(k: int, dtype: torch.dtype) -> None:
    """Limits are guessed there from a sample; also where it misleads: its own rows lie together, or many are equal."""
    x = cloud(2100, 8)
    sampled = (torch.arange(240, dtype=torch.float64) * 0.6180339887498949 % 1 * len(x)).long()
    for change in (
        lambda x: x,
        lambda x: x.index_fill(0, sampled, 0) + 1e-3 * x,
        lambda x: x.round(),
        lambda x: x + 500,
    ):
        points = change(x).to(dtype)
        for options in ({"k": k}, {"k": k // 10, "dilation": 10, "metric": "inner"}):
            index, distance = knn(points, **options)
            # A row of NaN is nobody's neighbour, and there nothing is guessed.
            expected = knn(torch.cat([points, points[:1] * torch.nan]), **options)
            assert torch.equal(index, expected[0][:-1])
            assert torch.equal(distance, expected[1][:-1])
            if options.get("metric") != "inner" or dtype == torch.float64:
                assert torch.equal(index[sampled[:20]], neighbours(points[sampled[:20]], points, **options)[0])


@by_dtype
def test_cosine(dtype: torch.dtype) -> None:
    query, points = cloud(80, 12).to(dtype), (cloud(150, 12) + 1).to(dtype)
    index, distance = knn(query, points, k=10, metric="cosine")
    exact = distances(query, points, index, "cosine")
    torch.testing.assert_close(distance.double(), exact, rtol=1e-5, atol=1e-6)
    farthest = distances(query, points, neighbours(query, points, 10, metric="cosine")[0], "cosine")
    torch.testing.assert_close(exact, farthest, rtol=1e-5, atol=1e-6)
    gradient = torch.autograd.functional.jacobian(
        lambda q: knn(q, points, k=2, metric="cosine")[1].sum(), query.double()
    )
    assert gradient.isfinite().all()


def test_batch_is_ptr() -> None:
    """Cloud numbers, some of them without points, as in PyG."""
    x, y = cloud(40, 3), cloud(30, 3)
    batch, other = torch.tensor([0] * 10 + [3] * 30), torch.tensor([0] * 12 + [1] * 3 + [3] * 15)
    expected = neighbours(x, y, 5, ptr=ptr(0, 10, 10, 10, 40), points_ptr=ptr(0, 12, 15, 15, 30))[0]
    assert torch.equal(knn(x, y, k=5, batch=batch, points_batch=other)[0], expected)
    assert torch.equal(knn(x, k=50, batch=batch)[0], neighbours(x, k=50, ptr=ptr(0, 10, 10, 10, 40))[0])


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ((0, 9, 8), "from 0 to 9, got 0 to 8"),
        ((1, 9), "from 0 to 9, got 1 to 9"),
        ((0, 12), "from 0 to 9, got 0 to 12"),
        ((0, 7, 5, 9), "that never descend, got 5 at position 2"),
    ],
)
def test_starts_are_checked(starts: tuple[int, ...], message: str) -> None:
    """Starts are data: the kernel reads them before it touches the rows."""
    x, wrong = cloud(9, 3), ptr(*starts)
    with pytest.raises((RuntimeError, ValueError), match="ptr: expected numbers"):
        torch.ops.paper_layers.knn(x, x, wrong, wrong, 3, 1, False, True)
    with pytest.raises(ValueError, match=f"^ptr: expected numbers {message}"):
        knn(x, k=3, ptr=wrong)
    right = torch.cat([torch.zeros(len(starts) - 1, dtype=torch.int64), ptr(9)])
    with pytest.raises(ValueError, match=f"^points_ptr: expected numbers {message}"):
        knn(x, x, k=3, ptr=right, points_ptr=wrong)


def test_autocast_does_not_round() -> None:
    x = cloud(400, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        index, distance = knn(x, k=9)
    assert distance.dtype == torch.float32
    assert torch.equal(index, neighbours(x, k=9)[0])


@contextmanager
def number_of_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.cpu_only
def test_same_for_any_number_of_threads() -> None:
    results = []
    for number in (1, 2, 5):
        with number_of_threads(number):
            results.append([knn(cloud(5000, channels), k=7)[0] for channels in (3, 6)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.cpu_only
@pytest.mark.parametrize("threads", [1, 2, 5])
@by_dtype
def test_cloud_that_searches_itself(threads: int, dtype: torch.dtype) -> None:
    """Products that serve two points, at the edges of tiles: the same as for queries that happen to be the points."""
    for n in (71, 72, 73, 96, 97, 143, 145, 480, 481, 1000):
        x = cloud(n, 10).to(dtype)
        x[n // 2] = torch.nan
        for options in ({"k": 16}, {"k": 9, "dilation": 7}, {"k": 60, "metric": "inner"}):
            with number_of_threads(threads):
                found = knn(x, **options)
            assert all(torch.equal(*pair) for pair in zip(found, knn(x.clone(), x, **options), strict=True))
