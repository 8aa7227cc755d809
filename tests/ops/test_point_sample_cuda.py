"""The CUDA kernels of point_sample against the formula in float64 on the CPU."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testing.cases import DTYPES
from testing.cuda_battery import DEVICE, CudaBattery, Step, assert_near, dtypes, needs_cuda, needs_memory, random
from tests.ops import test_point_sample as on_cpu

op: Any = importlib.import_module("paper_layers.ops.point_sample")  # the package's name is the function's

pytestmark = needs_cuda

LAST = torch.channels_last

forward = torch.ops.paper_layers.point_sample
backward_maps = torch.ops.paper_layers.point_sample_backward_maps
backward_points = torch.ops.paper_layers.point_sample_backward_points


def _points(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """In -1/4 to 5/4, and no pixel's centre or border for sizes that are powers of two: the gradient jumps there."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.randint(-16, 80, (*shape, 2), generator=generator) + 0.375) / 64).to(DEVICE, dtype)


def _check(points: Tensor, image: Tensor | None, maps: list[Tensor], *options: Any) -> None:
    """Forward and both gradients."""
    output = forward(points, image, maps, *options)
    grad = random(*output.shape, dtype=output.dtype, seed=7)
    got = [output, *backward_maps(grad, points, image, maps, *options)]
    got.append(backward_points(grad, points, image, maps, *options))
    exact = (points.cpu().double(), None if image is None else image.cpu(), [m.cpu().double() for m in maps], *options)
    want = [op._reference(*exact), *op._backward_maps_reference(grad.cpu().double(), *exact)]
    want.append(op._backward_points_reference(grad.cpu().double(), *exact))
    on_meta = op._fake(points, image, maps, *options)
    assert (output.shape, output.stride()) == (on_meta.shape, on_meta.stride())
    for a, b in zip(got, want, strict=True):
        assert a.device == points.device
        scale = max(1.0, float(b.abs().max()) if b.numel() else 1.0)
        assert_near(a, b, maps[0].dtype, atol=4 * scale)


@st.composite
def _problems(draw: Any) -> tuple[Any, ...]:
    number, seed, dtype = draw(st.integers(0, 3)), draw(st.integers(0, 2**20)), draw(st.sampled_from(DTYPES))
    sides = st.sampled_from([1, 2, 4, 8, 16, 32])
    maps = []
    for level in range(draw(st.integers(1, 3))):
        channels = draw(st.sampled_from([0, 1, 3, 8, 17, 40]))
        map = random(number, channels, draw(sides), draw(sides), dtype=dtype, seed=seed + level)
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


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_problems())
def test_matches_reference(problem: tuple[Any, ...]) -> None:
    _check(*problem)


@dtypes
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_many_blocks(dtype: torch.dtype, layout: torch.memory_format) -> None:
    maps = [random(2, 33, side, 64, dtype=dtype).contiguous(memory_format=layout) for side in (64, 8)]
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


@pytest.mark.needs_gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_more_elements_than_32_bits_count(layout: torch.memory_format) -> None:
    needs_memory(30)
    map = torch.empty(1, 2**11 + 8, 1024, 1024, device=DEVICE, dtype=torch.float16, memory_format=layout).normal_()
    assert map.numel() > 2**31
    points = torch.rand(1, 100, 2, device=DEVICE)
    output = forward(points, None, [map], None, "bilinear", "zeros")
    last = map[:, -8:].contiguous()
    assert torch.equal(output[:, -8:], forward(points, None, [last], None, "bilinear", "zeros"))
    (grad,) = backward_maps(output, points, None, [map], None, "bilinear", "zeros")
    (want,) = backward_maps(output[:, -8:], points, None, [last], None, "bilinear", "zeros")
    assert torch.equal(grad[:, -8:], want)


class TestPointSampleOnDevice(CudaBattery, on_cpu.TestPointSample):
    out_of_range = {  # noqa: RUF012
        "image": """
points, image, maps = torch.zeros(3, 5, 2), torch.full((3,), 2), [torch.zeros(2, 4, 8, 8)]
torch.ops.paper_layers.point_sample(points, image, maps, None, "bilinear", "zeros")
"""
    }

    def steps(self) -> dict[str, Step]:
        def inputs(seed: int) -> tuple[Tensor, ...]:
            points = _points(2, 5000, dtype=torch.float32, seed=seed) * 0.1
            return points, random(2, 33, 16, 16, seed=seed), random(2, 33, 5000, seed=seed + 1)

        def function(points: Tensor, map: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            arguments = (points, None, [map], None, "bilinear", "zeros")
            return forward(*arguments), *backward_maps(grad, *arguments), backward_points(grad, *arguments)

        return {"bilinear": Step(inputs, function)}

    def refused(self) -> dict[str, Callable[[], Any]]:
        points, map = _points(2, 5, dtype=torch.float32), random(2, 3, 8, 8)
        return {
            "points: expected": lambda: forward(points[0], None, [map], None, "bilinear", "zeros"),
            "mode: expected": lambda: forward(points, None, [map], None, "bicubic", "zeros"),
            "padding: expected": lambda: forward(points, None, [map], None, "bilinear", "wrap"),
        }

    def refused_devices(self) -> dict[str, Callable[[], Any]]:
        points, map = _points(2, 5, dtype=torch.float32), random(2, 3, 8, 8)
        return {"expected the device": lambda: forward(points, None, [map.cpu()], None, "bilinear", "zeros")}
