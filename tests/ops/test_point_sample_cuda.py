"""The CUDA kernels of point_sample against the formula in float64 on the CPU."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paper_layers

op: Any = importlib.import_module("paper_layers.ops.point_sample")  # the package's name is the function's

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is available")

DEVICE = "cuda"
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
LAST = torch.channels_last

forward = torch.ops.paper_layers.point_sample
backward_maps = torch.ops.paper_layers.point_sample_backward_maps
backward_points = torch.ops.paper_layers.point_sample_backward_points


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _points(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """In -1/4 to 5/4, and no pixel's centre or border for sizes that are powers of two: the gradient jumps there."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.randint(-16, 80, (*shape, 2), generator=generator) + 0.375) / 64).to(DEVICE, dtype)


def _check(points: Tensor, image: Tensor | None, maps: list[Tensor], *options: Any) -> None:
    """Forward and both gradients."""
    output = forward(points, image, maps, *options)
    grad = _random(*output.shape, dtype=output.dtype, seed=7)
    got = [output, *backward_maps(grad, points, image, maps, *options)]
    got.append(backward_points(grad, points, image, maps, *options))
    exact = (points.cpu().double(), None if image is None else image.cpu(), [m.cpu().double() for m in maps], *options)
    want = [op._reference(*exact), *op._backward_maps_reference(grad.cpu().double(), *exact)]
    want.append(op._backward_points_reference(grad.cpu().double(), *exact))
    on_meta = op._fake(points, image, maps, *options)
    assert (output.shape, output.stride()) == (on_meta.shape, on_meta.stride())
    tolerance = TOLERANCE[maps[0].dtype]
    for a, b in zip(got, want, strict=True):
        assert a.device == points.device
        scale = max(1.0, float(b.abs().max()) if b.numel() else 1.0)
        torch.testing.assert_close(a.cpu().double(), b, rtol=tolerance, atol=4 * tolerance * scale, check_stride=False)


@st.composite
def _problems(draw: Any) -> tuple[Any, ...]:
    number, seed, dtype = draw(st.integers(0, 3)), draw(st.integers(0, 2**20)), draw(st.sampled_from(DTYPES))
    sides = st.sampled_from([1, 2, 4, 8, 16, 32])
    maps = []
    for level in range(draw(st.integers(1, 3))):
        channels = draw(st.sampled_from([0, 1, 3, 8, 17, 40]))
        map = _random(number, channels, draw(sides), draw(sides), dtype=dtype, seed=seed + level)
        layout = draw(st.sampled_from(["contiguous", "channels_last", "expanded"]))
        if layout == "channels_last":
            map = map.contiguous(memory_format=LAST)
        elif layout == "expanded":
            map = map[..., :1].expand(map.shape)
        maps.append(map)
    image, scale, rows = None, None, number
    if draw(st.booleans()) and number:
        rows = draw(st.integers(0, 5))
        image = torch.randint(0, number, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        scale = [8.0 * 0.5**level for level in range(len(maps))]
    points = _points(rows, draw(st.sampled_from([0, 1, 30, 200])), seed=seed)
    if dtype != torch.float64:
        points = points.float()
    return points, image, maps, scale, draw(st.sampled_from(op.MODES)), draw(st.sampled_from(op.PADDINGS))


@pytest.mark.parametrize("name", ["point_sample", "point_sample_backward_maps", "point_sample_backward_points"])
def test_kernels_are_loaded(name: str) -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"paper_layers::{name}", DEVICE.upper())
    assert registered, paper_layers.show_config()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_problems())
def test_matches_reference(problem: tuple[Any, ...]) -> None:
    _check(*problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_many_blocks(dtype: torch.dtype, layout: torch.memory_format) -> None:
    maps = [_random(2, 33, side, 64, dtype=dtype).contiguous(memory_format=layout) for side in (64, 8)]
    points = _points(2, 3000, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    _check(points, None, maps, None, "bilinear", "zeros")


@pytest.mark.parametrize("padding", op.PADDINGS)
@pytest.mark.parametrize("mode", op.MODES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_any_coordinate(value: float, mode: str, padding: str) -> None:
    points = _points(2, 50, dtype=torch.float32)
    points[:, ::3, 0] = value
    output = forward(points, None, [torch.ones(2, 5, 4, 8, device=DEVICE)], None, mode, padding)
    expected = 1.0 if padding == "border" and not math.isnan(value) else 0.0
    inside = (points[..., 1:2].mT > 0.2) & (points[..., 1:2].mT < 0.8)  # no row of padding
    assert torch.equal(output[:, :, ::3][inside.expand_as(output)[:, :, ::3]].unique().cpu(), torch.tensor([expected]))
    assert output.isfinite().all()


def test_backward_is_deterministic() -> None:
    points, maps = _points(2, 5000, dtype=torch.float32) * 0.1, [_random(2, 33, 16, 16)]
    grad = _random(2, 33, 5000, seed=1)
    first, second = (backward_maps(grad, points, None, maps, None, "bilinear", "zeros")[0] for _ in range(2))
    assert torch.equal(first, second)


def test_gradients() -> None:
    points, map = _points(2, 5).requires_grad_(), _random(2, 3, 8, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, m: paper_layers.point_sample(m, p), (points, map))
    assert torch.autograd.gradgradcheck(lambda p, m: paper_layers.point_sample(m, p), (points, map))


def test_opcheck() -> None:
    tests = ("test_schema", "test_faketensor")
    arguments = (_points(2, 6, dtype=torch.float32), None, [_random(2, 3, 8, 4), _random(2, 2, 4, 4)])
    options = (None, "bilinear", "zeros")
    torch.library.opcheck(forward.default, (*arguments, *options), test_utils=tests)
    for backward in (backward_maps, backward_points):
        torch.library.opcheck(backward.default, (_random(2, 5, 6), *arguments, *options), test_utils=tests)


def test_image_number_out_of_range_is_an_assertion() -> None:
    """In a process of its own, since the device is of no more use to one that failed an assertion."""
    code = """
import torch, paper_layers
points, image = torch.zeros(3, 5, 2, device="cuda"), torch.full((3,), 2, device="cuda")
maps = [torch.zeros(2, 4, 8, 8, device="cuda")]
torch.ops.paper_layers.point_sample(points, image, maps, None, "bilinear", "zeros")
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode != 0
    assert "device-side assert" in result.stderr


def test_graph_capture() -> None:
    points, maps, options = _points(2, 50, dtype=torch.float32), [_random(2, 8, 16, 16)], (None, "bilinear", "zeros")

    def step() -> tuple[Tensor, ...]:
        output = forward(points, None, maps, *options)
        grads = backward_maps(output, points, None, maps, *options)
        return output, *grads, backward_points(output, points, None, maps, *options)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    points.copy_(_points(2, 50, dtype=torch.float32, seed=3))
    maps[0].copy_(_random(2, 8, 16, 16, seed=4))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_more_elements_than_32_bits_count(layout: torch.memory_format) -> None:
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free device memory")
    map = torch.empty(1, 2**11 + 8, 1024, 1024, device=DEVICE, dtype=torch.float16, memory_format=layout).normal_()
    assert map.numel() > 2**31
    points = torch.rand(1, 100, 2, device=DEVICE)
    output = forward(points, None, [map], None, "bilinear", "zeros")
    last = map[:, -8:].contiguous()
    assert torch.equal(output[:, -8:], forward(points, None, [last], None, "bilinear", "zeros"))
    (grad,) = backward_maps(output, points, None, [map], None, "bilinear", "zeros")
    (want,) = backward_maps(output[:, -8:], points, None, [last], None, "bilinear", "zeros")
    assert torch.equal(grad[:, -8:], want)
