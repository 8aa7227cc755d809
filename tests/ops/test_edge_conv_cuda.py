"""The CUDA kernels of edge_conv against the formula in float64 on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testing.cuda_battery import DEVICE, LAYOUTS, CudaBattery, Step, assert_near, dtypes, needs_cuda, random, table
from tests.ops import test_edge_conv as on_cpu

op = importlib.import_module("paper_layers.ops.edge_conv")  # The package has a function of this name.

pytestmark = needs_cuda

forward = torch.ops.paper_layers.edge_conv
backward = torch.ops.paper_layers.edge_conv_backward


def _check(
    center: Tensor, neighbor: Tensor, index: Tensor, slope: float, smallest: Tensor | None, statistics: bool
) -> None:
    """All outputs of both directions. Half types round before they compare, as the reference does."""
    wide = torch.promote_types(center.dtype, torch.float32)
    factor = torch.tensor(slope, dtype=wide, device=DEVICE)
    output, mean, var = forward(center, neighbor, index, factor, smallest, 0.0, statistics)
    grad = random(*output.shape, dtype=center.dtype, seed=3)
    grad_mean, grad_var = (random(len(mean), dtype=wide, seed=seed) for seed in (4, 5))
    grads = backward(grad, grad_mean, grad_var, center, neighbor, index, factor, output, mean, 0.0)
    c, n, i, f = center.cpu().double(), neighbor.cpu().double(), index.cpu(), factor.cpu().double()
    least = None if smallest is None else smallest.cpu()
    expected = op._reference(c, n, i, f, least, 0.0, statistics)
    exact = (grad.cpu().double(), grad_mean.cpu().double(), grad_var.cpu().double(), c, n, i, f)
    if center.dtype.itemsize < 4:  # which edge was kept is seen after rounding
        half = (grad.cpu(), *(t.cpu() for t in (grad_mean, grad_var)), center.cpu(), neighbor.cpu(), i, factor.cpu())
        wanted = op._backward_reference(*half, output.cpu(), mean.cpu(), 0.0)
    else:
        wanted = op._backward_reference(*exact, *expected[:2], 0.0)
    terms = max(1, index.numel()) ** 0.5
    names = ("output", "mean", "var", "grad_center", "grad_neighbor", "grad_slope")
    for name, got, want in zip(names, (output, mean, var, *grads), (*expected, *wanted), strict=True):
        atol = terms * 8 if name.startswith("grad") else 8
        assert_near(got, want, center.dtype, rtol=10, atol=atol, name=name)


@st.composite
def _problems(draw: Any) -> tuple[Any, ...]:
    rows, nodes, k = draw(st.integers(0, 50)), draw(st.integers(0, 50)), draw(st.integers(0, 20))
    channels, seed = draw(st.sampled_from([0, 1, 3, 4, 8, 17, 64])), draw(st.integers(0, 2**20))
    center = (4 * random(nodes, channels, seed=seed)).round() / 4
    neighbor = (4 * random(rows, channels, seed=seed + 1)).round() / 4
    slope = draw(st.sampled_from([0.0, 0.25, 1.0, 2.0, -0.5]))
    smallest = draw(st.sampled_from([None, torch.arange(channels, device=DEVICE) % 3 == 0]))
    layout = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))]
    return layout(center), layout(neighbor), table(nodes, k, rows=rows, seed=seed), slope, smallest, draw(st.booleans())


@dtypes
def test_equals_reference(dtype: torch.dtype) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(problem=_problems())
    def check(problem: tuple[Any, ...]) -> None:
        center, neighbor, *rest = problem
        _check(center.to(dtype), neighbor.to(dtype), *rest)

    check()


@dtypes
@pytest.mark.parametrize("channels", [64, 63])
def test_many_blocks(dtype: torch.dtype, channels: int) -> None:
    """More nodes than workers, and many edges into few rows."""
    center, neighbor = ((4 * random(9000, channels, seed=s)).round().to(dtype) / 4 for s in (0, 1))
    for rows in (9000, 5):
        _check(center, neighbor, table(9000, 16, rows=rows), 0.25, torch.arange(channels, device=DEVICE) < 9, True)


def test_extremes() -> None:
    center = torch.zeros(3, 4, device=DEVICE)
    neighbor = torch.tensor([-torch.inf, 1.0, torch.nan], device=DEVICE).unsqueeze(1).expand(3, 4)
    slope, index = torch.zeros((), device=DEVICE), torch.tensor([[0], [1], [0]], device=DEVICE)
    output, mean, _ = forward(center, neighbor, index, slope, None, 0.0, True)
    assert output[:, 0].tolist() == [0, 1, 0]
    torch.testing.assert_close(mean, torch.full((4,), 1 / 3, device=DEVICE))
    index = torch.tensor([[0, 2], [2, 1], [2, -1]], device=DEVICE)
    assert forward(center, neighbor, index, slope, None, 0.0, False)[0].isnan().all()
    offset = random(3000, 8) + 1e4
    _, _, var = forward(offset, random(3000, 8, seed=1), table(3000, 9, rows=3000), slope + 1, None, 0.0, True)
    torch.testing.assert_close(var, torch.full_like(var, 2.0), rtol=0.2, atol=0)


@pytest.mark.parametrize(("nodes", "rows", "k"), [(0, 5, 3), (5, 0, 3), (5, 5, 0)])
def test_empty(nodes: int, rows: int, k: int) -> None:
    index = torch.full((nodes, k), -1, device=DEVICE)
    _check(random(nodes, 4), random(rows, 4), index, 0.0, None, True)


class TestEdgeConvOnDevice(CudaBattery, on_cpu.TestEdgeConv):
    out_of_range = {  # noqa: RUF012
        "index": "paper_layers.edge_conv(torch.ones(8, 4), torch.ones(10, 4), torch.full((8, 3), 10))"
    }

    def steps(self) -> dict[str, Step]:
        def inputs(seed: int) -> tuple[Tensor, ...]:
            return random(9000, 32, seed=seed), random(9000, 32, seed=seed + 1), table(9000, 20, rows=50, seed=seed)

        def function(center: Tensor, neighbor: Tensor, index: Tensor) -> tuple[Tensor, ...]:
            slope = torch.full((), 0.2, device=center.device)
            output, mean, var = forward(center, neighbor, index, slope, None, 0.0, True)
            return output, mean, var, *backward(output, mean, var, center, neighbor, index, slope, output, mean, 0.0)

        return {"with statistics": Step(inputs, function)}

    def refused(self) -> dict[str, Callable[[], Any]]:
        x, i, slope = random(9, 4), table(9, 3, rows=9), torch.ones((), device=DEVICE)
        return {
            "center: expected": lambda: forward(x[0], x, i, slope, None, 0.0, True),
            "neighbor: expected": lambda: forward(x, x[:, :2], i, slope, None, 0.0, True),
            "index: expected int64": lambda: forward(x, x, i.int(), slope, None, 0.0, True),
        }

    def refused_devices(self) -> dict[str, Callable[[], Any]]:
        x, i, slope = random(9, 4), table(9, 3, rows=9), torch.ones((), device=DEVICE)
        return {
            "neighbor: expected the device": lambda: forward(x, x.cpu(), i, slope, None, 0.0, True),
            "index: expected the device": lambda: forward(x, x, i.cpu(), slope, None, 0.0, True),
        }
