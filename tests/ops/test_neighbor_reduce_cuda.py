"""The CUDA kernels of neighbor_reduce against the formula in float64 on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testing.cases import DTYPES
from testing.cuda_battery import (
    DEVICE,
    LAYOUTS,
    CudaBattery,
    Step,
    assert_near,
    dtypes,
    needs_cuda,
    needs_memory,
    random,
    table,
)
from tests.ops import test_neighbor_reduce as on_cpu

op = importlib.import_module("paper_layers.ops.neighbor_reduce")  # The package has a function of this name.

pytestmark = needs_cuda

forward = torch.ops.paper_layers.neighbor_reduce
backward = torch.ops.paper_layers.neighbor_reduce_backward


def _check(input: Tensor, index: Tensor, grad: Tensor, reduction: str, relative: bool = False) -> None:
    """Forward, chosen columns and backward."""
    output, arg = forward(input, index, reduction, relative)
    gradient = backward(grad, index, arg, len(input), reduction, relative)
    x, i, g = input.cpu().double(), index.cpu(), grad.cpu().double()
    expected, chosen = op._reference(x, i, reduction, relative)
    assert torch.equal(arg.cpu(), chosen)
    degree = int(i[i >= 0].bincount().max()) if bool((i >= 0).any()) else 1
    pairs = {
        "output": (output, expected, max(1, index.shape[1])),
        "gradient": (gradient, op._backward_reference(g, i, chosen, len(input), reduction, relative), degree),
    }
    for name, (got, want, terms) in pairs.items():
        assert (got.dtype, got.device) == (input.dtype, input.device)
        assert_near(got, want, input.dtype, atol=terms**0.5, name=name)


@st.composite
def _problems(draw: Any) -> tuple[Tensor, Tensor, Tensor, str, bool]:
    rows, k, relative = draw(st.integers(0, 60)), draw(st.integers(0, 20)), draw(st.booleans())
    nodes = rows if relative else draw(st.integers(0, 60))
    channels = draw(st.sampled_from([0, 1, 2, 3, 4, 8, 17, 40, 100]))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31))
    change = draw(
        st.sampled_from(
            [
                lambda x: x,
                lambda x: (2 * x).round(),
                lambda x: torch.where(x > 2, torch.nan, x),
                lambda x: torch.where(x > 1, torch.inf, -torch.inf).to(x.dtype),
            ]
        )
    )
    layouts = st.sampled_from(list(LAYOUTS))
    input = LAYOUTS[draw(layouts)](change(random(rows, channels, dtype=dtype, seed=seed)))
    grad = LAYOUTS[draw(layouts)](random(nodes, channels, dtype=dtype, seed=seed + 1))
    index = table(nodes, k, rows=draw(st.integers(0, rows)), seed=seed)
    if draw(st.booleans()):
        index = index.mT.contiguous().mT
    return input, index, grad, draw(st.sampled_from(op.REDUCTIONS)), relative


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_problems())
def test_matches_reference(problem: tuple[Tensor, Tensor, Tensor, str]) -> None:
    _check(*problem)


@dtypes
@pytest.mark.parametrize("reduction", op.REDUCTIONS)
@pytest.mark.parametrize("channels", [3, 64, 513])
def test_many_blocks(dtype: torch.dtype, reduction: str, channels: int) -> None:
    index = table(900, 19, rows=1100)
    _check(random(1100, channels, dtype=dtype), index, random(900, channels, dtype=dtype, seed=1), reduction)


@pytest.mark.parametrize("reduction", op.REDUCTIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_extremes(reduction: str, value: float) -> None:
    input, grad = random(50, 8), random(40, 8, seed=1)
    index = table(40, 9, rows=50)
    index[3] = -1
    input[:5, 2] = value
    _check(input, index, grad, reduction)
    _check(torch.full_like(input, value), index, grad, reduction)
    grad[2, 3] = value
    _check(random(50, 8), index, grad, reduction)


@pytest.mark.parametrize("reduction", op.REDUCTIONS)
@pytest.mark.parametrize(("rows", "nodes", "k", "channels"), [(0, 5, 3, 4), (5, 0, 3, 4), (5, 4, 0, 4), (5, 4, 3, 0)])
def test_empty(reduction: str, rows: int, nodes: int, k: int, channels: int) -> None:
    _check(random(rows, channels), table(nodes, k, rows=rows), random(nodes, channels, seed=1), reduction)


@pytest.mark.parametrize("reduction", op.REDUCTIONS)
def test_many_edges_into_one_row(reduction: str) -> None:
    index = torch.zeros(5000, 16, dtype=torch.int64, device=DEVICE)
    index[:, 3] = -1
    _check(random(3, 8, dtype=torch.float64), index, random(5000, 8, dtype=torch.float64, seed=1), reduction)


def test_backward_ignores_columns_that_do_not_exist() -> None:
    arg = torch.tensor([[0, 7, -5], [1, 1, 2]], dtype=torch.int32, device=DEVICE)
    index = torch.tensor([[1, 0], [2, -1]], device=DEVICE)
    result = backward(torch.ones(2, 3, device=DEVICE), index, arg, 3, "max", False)
    assert result.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.needs_gpu
@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_more_elements_than_32_bits_count(reduction: str) -> None:
    needs_memory(30)
    rows, channels = 2**20 + 5, 2**11
    x = torch.empty(rows, channels, device=DEVICE, dtype=torch.float16).normal_()
    assert x.numel() > 2**31
    index = table(rows, 2, rows=rows)
    output, arg = forward(x, index, reduction, False)
    gradient = backward(output, index, arg, rows, reduction, False)
    # The last channels by themselves go the way of 32 bits.
    part = x[:, -8:].contiguous()
    last, last_arg = forward(part, index, reduction, False)
    assert torch.equal(output[:, -8:], last)
    torch.testing.assert_close(gradient[:, -8:], backward(last, index, last_arg, rows, reduction, False))


class TestNeighborReduceOnDevice(CudaBattery, on_cpu.TestNeighborReduce):
    op_dtypes = tuple(DTYPES)
    out_of_range = {  # noqa: RUF012
        "forward": """
x, i = torch.zeros(10, 4), torch.full((8, 4), 10)
torch.ops.paper_layers.neighbor_reduce(x, i, "max", False)
""",
        "backward": """
x, i = torch.zeros(10, 4), torch.full((8, 4), 10)
torch.ops.paper_layers.neighbor_reduce_backward(x[:8], i, i.int()[:, :0], 10, "sum", False)
""",
    }

    def steps(self) -> dict[str, Step]:
        def inputs(seed: int) -> tuple[Tensor, ...]:
            return random(500, 33, seed=seed), table(4000, 20, rows=500, seed=seed)

        def function(input: Tensor, index: Tensor, reduction: str) -> tuple[Tensor, ...]:
            output, arg = forward(input, index, reduction, False)
            return output, arg, backward(output, index, arg, len(input), reduction, False)

        return {reduction: Step(inputs, partial(function, reduction=reduction)) for reduction in op.REDUCTIONS}

    def refused(self) -> dict[str, Callable[[], Any]]:
        x, i = random(9, 4), table(7, 3, rows=9)
        out, arg = forward(x, i, "max", False)
        return {
            "input: expected two dimensions or three": lambda: forward(x[0], i, "max", False),
            "index: expected int64": lambda: forward(x, i.int(), "max", False),
            "reduce: expected": lambda: forward(x, i, "median", False),
            "input: expected float32": lambda: forward(x.int(), i, "max", False),
            "grad: expected the rows": lambda: backward(out[:3], i, arg, 9, "max", False),
            "arg: expected int32": lambda: backward(out, i, arg[:, :2], 9, "max", False),
            "rows: expected": lambda: backward(out, i, arg, -1, "max", False),
        }

    def refused_devices(self) -> dict[str, Callable[[], Any]]:
        x, i = random(9, 4), table(7, 3, rows=9)
        out, arg = forward(x, i, "max", False)
        return {
            "index: expected the device": lambda: forward(x, i.cpu(), "max", False),
            "arg: expected the device": lambda: backward(out, i, arg.cpu(), 9, "max", False),
        }
