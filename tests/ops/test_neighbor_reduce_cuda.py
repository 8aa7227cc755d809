"""The CUDA kernels of neighbor_reduce against the formula in float64 on the CPU."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paper_layers

op = importlib.import_module("paper_layers.ops.neighbor_reduce")  # The package has a function of this name.

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is available")

DEVICE = "cuda"
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)

forward = torch.ops.paper_layers.neighbor_reduce
backward = torch.ops.paper_layers.neighbor_reduce_backward


def _offset(x: Tensor) -> Tensor:
    """The same strides, one element into the storage: not aligned for loads of several elements."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


LAYOUTS = {
    "contiguous": Tensor.contiguous,
    "offset": lambda x: _offset(x.contiguous()),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every_other": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


def _check(input: Tensor, index: Tensor, grad: Tensor, reduce: str, relative: bool = False) -> None:
    """Forward, chosen columns and backward."""
    output, arg = forward(input, index, reduce, relative)
    gradient = backward(grad, index, arg, len(input), reduce, relative)
    x, i, g = input.cpu().double(), index.cpu(), grad.cpu().double()
    expected, chosen = op._reference(x, i, reduce, relative)
    assert torch.equal(arg.cpu(), chosen)
    tolerance = TOLERANCE[input.dtype]
    degree = int(i[i >= 0].bincount().max()) if bool((i >= 0).any()) else 1
    pairs = {
        "output": (output, expected, max(1, index.shape[1])),
        "gradient": (gradient, op._backward_reference(g, i, chosen, len(input), reduce, relative), degree),
    }
    for name, (got, want, terms) in pairs.items():
        assert (got.dtype, got.device) == (input.dtype, input.device)
        torch.testing.assert_close(
            got.cpu().double(),
            want,
            rtol=tolerance,
            atol=tolerance * terms**0.5,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _table(*shape: int, rows: int, seed: int = 0) -> Tensor:
    """Neighbours, some repeated and some missing."""
    return torch.randint(-1, rows, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


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
    input = LAYOUTS[draw(layouts)](change(_random(rows, channels, dtype=dtype, seed=seed)))
    grad = LAYOUTS[draw(layouts)](_random(nodes, channels, dtype=dtype, seed=seed + 1))
    index = _table(nodes, k, rows=draw(st.integers(0, rows)), seed=seed)
    if draw(st.booleans()):
        index = index.mT.contiguous().mT
    return input, index, grad, draw(st.sampled_from(op.REDUCTIONS)), relative


@pytest.mark.parametrize("name", ["neighbor_reduce", "neighbor_reduce_backward"])
def test_kernels_are_loaded(name: str) -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"paper_layers::{name}", DEVICE.upper())
    assert registered, paper_layers.show_config()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_problems())
def test_matches_reference(problem: tuple[Tensor, Tensor, Tensor, str]) -> None:
    _check(*problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", op.REDUCTIONS)
@pytest.mark.parametrize("channels", [3, 64, 513])
def test_many_blocks(dtype: torch.dtype, reduce: str, channels: int) -> None:
    index = _table(900, 19, rows=1100)
    _check(_random(1100, channels, dtype=dtype), index, _random(900, channels, dtype=dtype, seed=1), reduce)


@pytest.mark.parametrize("reduce", op.REDUCTIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_extremes(reduce: str, value: float) -> None:
    input, grad = _random(50, 8), _random(40, 8, seed=1)
    index = _table(40, 9, rows=50)
    index[3] = -1
    input[:5, 2] = value
    _check(input, index, grad, reduce)
    _check(torch.full_like(input, value), index, grad, reduce)
    grad[2, 3] = value
    _check(_random(50, 8), index, grad, reduce)


@pytest.mark.parametrize("reduce", op.REDUCTIONS)
@pytest.mark.parametrize(("rows", "nodes", "k", "channels"), [(0, 5, 3, 4), (5, 0, 3, 4), (5, 4, 0, 4), (5, 4, 3, 0)])
def test_empty(reduce: str, rows: int, nodes: int, k: int, channels: int) -> None:
    _check(_random(rows, channels), _table(nodes, k, rows=rows), _random(nodes, channels, seed=1), reduce)


@pytest.mark.parametrize("reduce", op.REDUCTIONS)
def test_many_edges_into_one_row(reduce: str) -> None:
    index = torch.zeros(5000, 16, dtype=torch.int64, device=DEVICE)
    index[:, 3] = -1
    _check(_random(3, 8, dtype=torch.float64), index, _random(5000, 8, dtype=torch.float64, seed=1), reduce)


@pytest.mark.parametrize("reduce", op.REDUCTIONS)
def test_backward_is_deterministic(reduce: str) -> None:
    input, index = _random(500, 33), _table(4000, 20, rows=500)
    output, arg = forward(input, index, reduce, False)
    first, second = (backward(output, index, arg, 500, reduce, False) for _ in range(2))
    assert torch.equal(first, second)


def test_backward_ignores_columns_that_do_not_exist() -> None:
    arg = torch.tensor([[0, 7, -5], [1, 1, 2]], dtype=torch.int32, device=DEVICE)
    index = torch.tensor([[1, 0], [2, -1]], device=DEVICE)
    result = backward(torch.ones(2, 3, device=DEVICE), index, arg, 3, "max", False)
    assert result.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("reduce", op.REDUCTIONS)
def test_gradients(reduce: str) -> None:
    input, index = _random(9, 4, dtype=torch.float64).requires_grad_(), _table(7, 4, rows=9)
    assert torch.autograd.gradcheck(lambda x: paper_layers.neighbor_reduce(x, index, reduce), (input,))
    assert torch.autograd.gradgradcheck(lambda x: paper_layers.neighbor_reduce(x, index, reduce), (input,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", op.REDUCTIONS)
def test_opcheck(dtype: torch.dtype, reduce: str) -> None:
    tests = ("test_schema", "test_faketensor")
    input, index = _random(9, 8, dtype=dtype), _table(7, 4, rows=9)
    output, arg = forward(input, index, reduce, False)
    torch.library.opcheck(forward.default, (input, index, reduce, False), test_utils=tests)
    torch.library.opcheck(backward.default, (output, index, arg, 9, reduce, False), test_utils=tests)


def test_bad_arguments_are_refused_before_memory_is_touched() -> None:
    x, i = _random(9, 4), _table(7, 3, rows=9)
    out, arg = forward(x, i, "max", False)
    for name, call in {
        "input: expected two dimensions": lambda: forward(x[0], i, "max", False),
        "index: expected int64": lambda: forward(x, i.int(), "max", False),
        "index: expected the device": lambda: forward(x, i.cpu(), "max", False),
        "reduce: expected": lambda: forward(x, i, "median", False),
        "input: expected float32": lambda: forward(x.int(), i, "max", False),
        "grad: expected the rows": lambda: backward(out[:3], i, arg, 9, "max", False),
        "arg: expected int32": lambda: backward(out, i, arg[:, :2], 9, "max", False),
        "arg: expected the device": lambda: backward(out, i, arg.cpu(), 9, "max", False),
        "rows: expected": lambda: backward(out, i, arg, -1, "max", False),
    }.items():
        with pytest.raises(RuntimeError, match=name):
            call()


@pytest.mark.parametrize(
    "call",
    [
        "torch.ops.paper_layers.neighbor_reduce(x, i, 'max', False)",
        "torch.ops.paper_layers.neighbor_reduce_backward(x[:8], i, i.int()[:, :0], 10, 'sum', False)",
    ],
)
def test_rows_out_of_range_are_an_assertion(call: str) -> None:
    """In a process of its own, since the device is of no more use to one that failed an assertion."""
    code = f"""
import torch, paper_layers
x, i = torch.zeros(10, 4, device="cuda"), torch.full((8, 4), 10, device="cuda")
{call}
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode != 0
    assert "device-side assert" in result.stderr


def test_runs_on_the_current_stream() -> None:
    x, index = torch.zeros(20000, 64, device=DEVICE), _table(20000, 16, rows=20000)
    index[:, 0] = 0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # the reduction must wait for what comes before it on its own stream
        x.fill_(1.0)
        output, arg = forward(x, index, "max", False)
        gradient = backward(output, index, arg, len(x), "max", False)
    stream.synchronize()
    assert torch.equal(output, torch.ones_like(output))
    torch.testing.assert_close(gradient.sum(), torch.tensor(float(output.numel()), device=DEVICE))


@pytest.mark.parametrize("reduce", op.REDUCTIONS)
def test_graph_capture(reduce: str) -> None:
    x, index = _random(200, 16), _table(150, 9, rows=200)

    def step() -> tuple[Tensor, ...]:
        output, arg = forward(x, index, reduce, False)
        return output, arg, backward(output, index, arg, len(x), reduce, False)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(_random(200, 16, seed=3))
    index.copy_(_table(150, 9, rows=200, seed=4))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_input() -> None:
    x, index = _random(20, 8).to("cuda:1"), _table(20, 3, rows=20).to("cuda:1")
    with torch.cuda.device(0):
        _check(x, index, x, "max")


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_more_elements_than_32_bits_count(reduce: str) -> None:
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free device memory")
    rows, channels = 2**20 + 5, 2**11
    x = torch.empty(rows, channels, device=DEVICE, dtype=torch.float16).normal_()
    assert x.numel() > 2**31
    index = _table(rows, 2, rows=rows)
    output, arg = forward(x, index, reduce, False)
    gradient = backward(output, index, arg, rows, reduce, False)
    # The last channels by themselves go the way of 32 bits.
    part = x[:, -8:].contiguous()
    last, last_arg = forward(part, index, reduce, False)
    assert torch.equal(output[:, -8:], last)
    torch.testing.assert_close(gradient[:, -8:], backward(last, index, last_arg, rows, reduce, False))
