"""The CUDA kernels of knn against the formula in float64 on the CPU."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import paper_layers
from testing.cases import DTYPES, TOLERANCE
from testing.cuda_battery import (
    DEVICE,
    CudaBattery,
    Step,
    assert_near,
    dtypes,
    needs_cuda,
    needs_memory,
    random,
    smaller,
)
from tests.ops import test_knn as on_cpu

op = importlib.import_module("paper_layers.ops.knn")  # The package has a function of this name.

pytestmark = needs_cuda

MANY = smaller(40000, emulated=3200)  # points of a cloud that is searched by a tree

forward = torch.ops.paper_layers.knn
backward = torch.ops.paper_layers.knn_backward
Options = tuple[Tensor | None, Tensor | None, int, int, bool, bool, Tensor | None]


def _check(query: Tensor, points: Tensor, options: Options, rows: int | None = None) -> None:
    """The same neighbours in the same order, and the gradients of their distances; of the first rows only, if given."""
    index, distance = forward(query, points, *options)
    on_cpu = tuple(t.cpu() if isinstance(t, Tensor) else t for t in options)
    expected = op._reference(query[..., :rows, :].cpu().double(), points.cpu().double(), *on_cpu)  # type: ignore[arg-type]
    assert torch.equal(index[..., :rows, :].cpu(), expected[0])
    dtype = torch.promote_types(query.dtype, torch.float32)
    assert (distance.dtype, distance.device) == (dtype, query.device)
    torch.testing.assert_close(
        distance[..., :rows, :].cpu(), expected[1].to(dtype), rtol=TOLERANCE[dtype][0], atol=1e-30
    )
    if rows is None and bool(points.isfinite().all() and query.isfinite().all()):
        _check_backward(query, points, index, options[4])


def _check_backward(query: Tensor, points: Tensor, index: Tensor, inner: bool) -> None:
    grad = torch.linspace(-1, 1, index.numel(), dtype=torch.promote_types(query.dtype, torch.float32)).view(index.shape)
    grads = backward(grad.to(DEVICE), query, points, index, inner)
    expected = op._backward_reference(grad.double(), query.cpu().double(), points.cpu().double(), index.cpu(), inner)
    terms = int((index >= 0).sum()) / max(1, points.shape[:-1].numel()) + index.shape[-1]
    size = max(1.0, *(float(t.abs().max()) if t.numel() else 0.0 for t in (query, points)))
    for got, want, rows in zip(grads, expected, (query, points), strict=True):
        assert (got.dtype, got.device, got.shape) == (rows.dtype, rows.device, rows.shape)
        assert_near(got, want.to(rows.dtype), rows.dtype, atol=terms * size)


def _ptr(*starts: int) -> Tensor:
    return torch.tensor(starts, device=DEVICE)


def _dense(
    k: int, dilation: int = 1, inner: bool = False, include_self: bool = True, positions: Tensor | None = None
) -> Options:
    return None, None, k, dilation, inner, include_self, positions


def _clusters(x: Tensor) -> Tensor:
    """Tight blobs far apart, which a grid of cells could not tell from points."""
    return x * 1e-3 + 1e4 * random(50, x.shape[-1], seed=9).repeat(len(x) // 50 + 1, 1)[: len(x)]


CLOUDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "far": lambda x: x + 1e5,
    "ties": lambda x: (2 * x).round(),
    "equal": lambda x: 0 * x + 0.5,
    "copies": lambda x: x[:6].repeat(len(x) // 6 + 1, 1)[: len(x)],
    "line": lambda x: x[:, :1].expand(x.shape).contiguous(),
    "sphere": lambda x: torch.cat([0 * x[:1], torch.nn.functional.normalize(x[1:], dim=1)]),
    "outlier": lambda x: torch.cat([x[:1] * 1e7, x[1:]]),
    "farther": lambda x: torch.cat([x[:1] * 1e30, x[1:]]),
    "clusters": _clusters,
}


@dtypes
def test_matches_reference(dtype: torch.dtype) -> None:
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(on_cpu.cases())
    def check(case: Any) -> None:
        options = case.options
        query, points = (t.to(DEVICE, dtype) for t in (case.tensors[0], case.tensors[-1]))
        starts = [options.get("ptr"), options.get("points_ptr", options.get("ptr"))]
        if query.dim() == 2 and starts[0] is None:
            query, points = query[None], points[None]
        *starts, positions = (None if t is None else t.to(DEVICE) for t in (*starts, options.get("positions")))
        settings = (options["k"], options["dilation"], options["metric"] == "inner", options.get("include_self", True))
        _check(query, points, (starts[0], starts[1], *settings, positions))

    check()


@dtypes
@pytest.mark.parametrize("channels", [1, 3, 4, 64, 513])
@pytest.mark.parametrize("inner", [False, True])
def test_many_blocks(dtype: torch.dtype, channels: int, inner: bool) -> None:
    clouds = 3 if channels < 513 else 1
    x, y = random(clouds, 300, channels, dtype=dtype), random(clouds, 650, channels, dtype=dtype, seed=1)
    _check(x, y, _dense(20, 2, inner))
    _check(y, y, _dense(20, 2, inner, False))
    _check(y, y, _dense(5, 8, inner, False, _ptr(0, 3, 20, 38, 39)))


def slow_where_emulated(*cases: tuple[Any, ...], slow: tuple[Any, ...]) -> list[Any]:
    """Mark one of the cases, which takes a minute there and is tested there by the others."""
    return [pytest.param(*case, marks=pytest.mark.slow_emulated if case == slow else ()) for case in cases]


@pytest.mark.parametrize(
    ("name", "channels"), slow_where_emulated(*itertools.product(CLOUDS, [3, 16]), slow=("farther", 3))
)
def test_many_blocks_of_all_kinds(channels: int, name: str) -> None:
    """More points in a cloud than candidates have room, some of them as near as makes no difference."""
    x = CLOUDS[name](random(3000, channels, dtype=torch.float64)).float()[None]
    for options in (_dense(12), _dense(5, 3, include_self=False)):
        _check(x, x, options)


@pytest.mark.parametrize("channels", [2, 20])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_extremes(channels: int, value: float) -> None:
    x = random(400, channels)
    x[5], x[9], x[11, 0], x[17] = value, -value, torch.nan, value
    for options in (_dense(390), _dense(12), _dense(12, inner=True), _dense(7, 2, include_self=False)):
        _check(x[None], x[None], options)
    _check(x[None], torch.full_like(x, value)[None], _dense(3))


@pytest.mark.parametrize("channels", [2, 20])
@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-310, 1e300])
def test_extremes_of_the_exponent(channels: int, scale: float) -> None:
    dtype = torch.float32 if 1e-40 < scale < 1e40 else torch.float64
    x = random(1, 700, channels, dtype=dtype) * scale
    index, _ = forward(x, x, *_dense(9))
    assert torch.equal(index.cpu(), op._reference(x.cpu(), x.cpu(), *_dense(9))[0])


@pytest.mark.parametrize(
    ("clouds", "m", "n", "channels"), [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (2, 0, 0, 3)]
)
def test_empty(clouds: int, m: int, n: int, channels: int) -> None:
    _check(random(clouds, m, channels), random(clouds, n, channels), _dense(3))
    starts = _ptr(*range(0, clouds * m + 1, max(1, m))) if m else _ptr(*[0] * (clouds + 1))
    points_starts = _ptr(*range(0, clouds * n + 1, max(1, n))) if n else _ptr(*[0] * (clouds + 1))
    _check(random(clouds * m, channels), random(clouds * n, channels), (starts, points_starts, 3, 1, False, True, None))


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize(("k", "dilation"), [(432, 1), (16, 27), (1000, 2), (1024, 4)])
def test_many_neighbours(channels: int, k: int, dilation: int) -> None:
    x = random(5000, channels)
    _check(x[None, :40], x[None], _dense(k, dilation))


@pytest.mark.parametrize(
    ("name", "channels"), slow_where_emulated(*itertools.product([*CLOUDS, "nan"], [1, 2, 3]), slow=("farther", 3))
)
def test_tree(channels: int, name: str) -> None:
    x = random(MANY, channels, dtype=torch.float64)
    x = (torch.where(x > 2, torch.nan, x) if name == "nan" else CLOUDS[name](x)).float()[None]
    _check(x, x, _dense(16, 2), rows=50)
    _check(x[:, :100], x, _dense(300), rows=100)


def test_tree_of_ragged_clouds() -> None:
    x = random(3 * MANY, 3)
    starts = _ptr(0, 17, 2 * MANY, 3 * MANY)
    index, distance = forward(x, x, starts, starts, 9, 1, False, False)
    bounds = starts.tolist()
    for start, end in itertools.pairwise(bounds):
        for i in (start, (start + end) // 2, end - 1):
            d = (x[start:end].double() - x[i].double()).square().sum(1)
            d[i - start] = torch.nan
            expected, order = d.sort(stable=True)
            there = min(9, end - start - 1)
            assert torch.equal(index[i, :there], order[:there] + start)
            torch.testing.assert_close(distance[i, :there].double(), expected[:there], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("channels", [3, 8])
def test_starts_out_of_order_touch_no_other_memory(channels: int) -> None:
    """The host does not read them: which neighbours there are is undefined, but every index is a row or -1."""
    x = random(500, channels)
    for starts in ((0, 700, 500), (-5, 100, 500), (0, 400, 100, 500), (2**62, -(2**62)), (0, 0), (300, 0)):
        index, _ = forward(x, x, _ptr(*starts), _ptr(*starts), 9, 1, False, True)
        assert -1 <= int(index.min()) <= int(index.max()) < 500
    index, distance = forward(x, x, _ptr(0, 400), _ptr(0, 400), 9, 1, False, True)
    assert bool((index[400:] == -1).all() and distance[400:].isinf().all() and (index[:400] >= 0).all())


@pytest.mark.parametrize("metric", op.METRICS)
def test_gradients(metric: str) -> None:
    query, points = (random(2, n, 4, dtype=torch.float64, seed=n).requires_grad_() for n in (7, 9))

    def distances(query: Tensor, points: Tensor) -> Tensor:
        return paper_layers.knn(query, points, k=3, metric=metric)[1]

    assert torch.autograd.gradcheck(distances, (query, points))
    assert torch.autograd.gradgradcheck(distances, (query, points))


@pytest.mark.needs_gpu
def test_more_elements_than_32_bits_count() -> None:
    needs_memory(40)
    points = torch.empty(1, 2**20 + 5, 2**11, device=DEVICE, dtype=torch.float16).normal_()
    assert points.numel() > 2**31
    index, distance = forward(points[:, -40:], points, *_dense(2))
    assert torch.equal(index[0, :, 0], torch.arange(points.shape[1] - 40, points.shape[1], device=DEVICE))
    assert not distance[..., 0].any()


class TestKNNOnDevice(CudaBattery, on_cpu.TestKNN):
    op_dtypes = tuple(DTYPES)
    out_of_range = {  # noqa: RUF012
        "index": """
x, i = torch.zeros(8, 4), torch.full((8, 3), 8)
torch.ops.paper_layers.knn_backward(torch.zeros(8, 3), x, x, i, False)
"""
    }

    def steps(self) -> dict[str, Step]:
        def dense(x: Tensor) -> tuple[Tensor, ...]:
            index, distance = forward(x, x, *_dense(20))
            return index, distance, *backward(distance, x, x, index, False)

        def ragged(x: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
            index, distance = forward(x, x, starts, starts, 9, 1, False, True, None)
            return index, distance, *backward(distance, x, x, index, False)

        return {
            "dense": Step(lambda seed: (random(2, 3000, 24, seed=seed),), dense),
            "ragged": Step(lambda seed: (random(500, 8, seed=seed), _ptr(0, 100 + seed, 100 + seed, 500)), ragged),
            "tree": Step(lambda seed: (random(1, MANY, 3, seed=seed),), dense),
            "many": Step(lambda seed: (random(1, MANY, 16, seed=seed),), dense),
        }

    def refused(self) -> dict[str, Callable[[], Any]]:
        x, starts = random(2, 9, 4), _ptr(0, 9)
        index, distance = forward(x, x, *_dense(3))
        return {
            "query: expected shape": lambda: forward(x[0, 0], x[0, 0], *_dense(3)),
            "points: expected the channels": lambda: forward(x, x[..., :2], *_dense(3)),
            "points: expected the dtype": lambda: forward(x, x.half(), *_dense(3)),
            "query_ptr and points_ptr": lambda: forward(x[0], x[0], *_dense(3)),
            "query_ptr: expected int64": lambda: forward(x[0], x[0], starts.int(), starts, 3, 1, False, True),
            "points_ptr: expected as many": lambda: forward(x[0], x[0], starts, _ptr(0, 4, 9), 3, 1, False, True),
            "positions: expected int64 of shape": lambda: forward(x, x, *_dense(3, positions=starts)),
            "k and dilation": lambda: forward(x, x, *_dense(0)),
            "include_self": lambda: forward(x, x[:, :5], *_dense(3, include_self=False)),
            "index: expected int64": lambda: backward(distance, x, x, index.int(), False),
            "grad: expected shape": lambda: backward(distance[:1], x, x, index, False),
        }

    def refused_devices(self) -> dict[str, Callable[[], Any]]:
        x, starts = random(2, 9, 4), _ptr(0, 9)
        index, distance = forward(x, x, *_dense(3))
        return {
            "points: expected the device": lambda: forward(x, x.cpu(), *_dense(3)),
            "points_ptr: expected the device": lambda: forward(x[0], x[0], starts, starts.cpu(), 3, 1, False, True),
            "positions: expected the device": lambda: forward(x, x, *_dense(len(starts), positions=starts.cpu())),
            "index: expected the device": lambda: backward(distance, x, x, index.cpu(), False),
            "grad: expected the device": lambda: backward(distance.cpu(), x, x, index, False),
        }
