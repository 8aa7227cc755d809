"""The CUDA kernels of lip_pool2d against the formula in float64 on the CPU."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paper_layers

op = importlib.import_module("paper_layers.ops.lip_pool2d")  # The package has a function of this name.

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is available")

DEVICE = "cuda"
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = list(TOLERANCE)
Geometry = tuple[list[int], list[int], list[int], bool]
RESNET: Geometry = ([3, 3], [2, 2], [1, 1], False)
DENSENET: Geometry = ([2, 2], [2, 2], [0, 0], False)

forward = torch.ops.paper_layers.lip_pool2d
backward = torch.ops.paper_layers.lip_pool2d_backward


def _offset(x: Tensor) -> Tensor:
    """The same strides, one element into the storage: not aligned for loads of several elements."""
    buffer = x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride())
    return buffer.copy_(x)


LAYOUTS = {
    "contiguous": Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "offset": lambda x: _offset(x.contiguous()),
    "offset_channels_last": lambda x: _offset(x.contiguous(memory_format=torch.channels_last)),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every_other": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def _check(input: Tensor, logit: Tensor, grad: Tensor, geometry: Geometry) -> None:
    """Forward and backward, values and strides; arguments may be anywhere, results are those of the device."""
    output = forward(input, logit, *geometry)
    grads = backward(grad, input, logit, output, *geometry)
    g, x, y = (tensor.detach().cpu().double() for tensor in (grad, input, logit))
    average = op._reference(x, y, *geometry)
    expected = (average, *op._backward_reference(g, x, y, average, *geometry))
    layout = op.memory_format(input)
    tolerance = TOLERANCE[input.dtype]
    for name, got, want in zip(("output", "grad_input", "grad_logit"), (output, *grads), expected, strict=True):
        assert (got.dtype, got.device) == (input.dtype, input.device)
        assert got.is_contiguous(memory_format=layout), f"{name}: {got.stride()} is not {layout}"
        # A shared logit's gradient is a sum over channels, so its error grows with theirs.
        scale = input.shape[1] if want.shape[1] != input.shape[1] else 1
        torch.testing.assert_close(
            got.cpu().double(),
            want,
            rtol=tolerance,
            atol=tolerance * max(1, scale),
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 8])
def test_half_gradients_of_images_far_from_zero(dtype: torch.dtype, layout: str, channels: int) -> None:
    """The gradients of a window's logits cancel: they are about averages that no half type has rounded."""
    input = LAYOUTS[layout]((8 + _random((2, 8, 20, 20), torch.float32, 0) / 4).to(dtype))
    logit, geometry = _random((2, channels, 20, 20), dtype, 1), ([15, 15], [1, 1], [0, 0], False)
    output = forward(input, logit, *geometry)
    grad = torch.ones_like(output)
    x, y = input.cpu().double(), logit.cpu().double()
    expected = op._backward_reference(grad.cpu().double(), x, y, op._reference(x, y, *geometry), *geometry)
    for got, want in zip(backward(grad, input, logit, output, *geometry), expected, strict=True):
        assert (got.cpu().double() - want).abs().max() < 5e-3 * want.abs().max()


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


@st.composite
def _problems(draw: Any) -> tuple[Tensor, Tensor, Tensor, Geometry]:
    kernel = draw(st.sampled_from([[3, 3], [2, 2], [1, 1], [3, 1], [2, 5], [5, 4]]))
    stride = [draw(st.integers(1, 6)) for _ in kernel]
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    ceil_mode = draw(st.booleans())
    sides = zip(kernel, stride, padding, strict=True)
    smallest = [max(1, k - 2 * p - (s - 1) * ceil_mode) for k, s, p in sides]
    size = [draw(st.one_of(st.just(n), st.integers(n, 19))) for n in smallest]
    batch, channels = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12]))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31))
    layouts = st.sampled_from(list(LAYOUTS))

    input = LAYOUTS[draw(layouts)](_random((batch, channels, *size), dtype, seed))
    depth = draw(st.sampled_from([1, channels]))
    scale = draw(st.sampled_from([1.0, 30.0, 1e4]))
    logit = LAYOUTS[draw(layouts)](_random((batch, depth, *size), dtype, seed + 1, scale))
    geometry = (kernel, stride, padding, ceil_mode)
    shape = tuple(op._output_shape(input, *geometry))
    grad = LAYOUTS[draw(layouts)](_random(shape, dtype, seed + 2))
    return input, logit, grad, geometry


@pytest.mark.parametrize("name", ["lip_pool2d", "lip_pool2d_backward"])
def test_kernels_are_loaded(name: str) -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"paper_layers::{name}", DEVICE.upper())
    assert registered, paper_layers.show_config()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_problems())
def test_matches_reference(problem: tuple[Tensor, Tensor, Tensor, Geometry]) -> None:
    _check(*problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("geometry", [RESNET, DENSENET, ([5, 3], [3, 2], [2, 1], True)])
def test_many_blocks(dtype: torch.dtype, layout: str, shared: bool, geometry: Geometry) -> None:
    input = LAYOUTS[layout](_random((3, 20, 57, 63), dtype, 0))
    logit = _random((3, 1 if shared else 20, 57, 63), dtype, 1, 3.0)
    _check(input, logit, _random(tuple(op._output_shape(input, *geometry)), dtype, 2), geometry)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("geometry", [RESNET, ([2, 2], [3, 3], [1, 1], False)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_extremes_stay_in_their_windows(layout: str, geometry: Geometry, value: float) -> None:
    shape = (2, 4, 9, 9)
    grad = _random(tuple(op._output_shape(torch.empty(shape), *geometry)), torch.float32, 2)
    for spoiled in range(3):
        tensors = [_random(shape, torch.float32, 0), _random(shape, torch.float32, 1), grad]
        tensors[spoiled][0, 1, 3, 2] = value
        tensors[spoiled][1, 2, 0, 0] = value
        input, logit, upstream = (LAYOUTS[layout](x) for x in tensors)
        _check(input, logit, upstream, geometry)
    everywhere = torch.full(shape, value, device=DEVICE)
    _check(LAYOUTS[layout](_random(shape, torch.float32, 0)), everywhere, grad, geometry)


def test_uncovered_positions_get_zero_gradients() -> None:
    geometry: Geometry = ([1, 2], [3, 4], [0, 0], False)
    input = _random((1, 3, 8, 11), torch.float32, 0)
    covered = torch.zeros_like(input, dtype=torch.bool)
    for column in range(2):
        covered[:, :, 0::3, column::4] = True
    covered[..., 10] = False
    input[~covered] = torch.nan
    output = forward(input, input, *geometry)
    assert output.isfinite().all()
    for gradient in backward(torch.ones_like(output), input, input, output, *geometry):
        assert torch.equal(gradient[~covered], torch.zeros_like(gradient[~covered]))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    for depth in {1, shape[1]}:
        input, logit = torch.empty(shape, device=DEVICE), torch.empty(shape[0], depth, *shape[2:], device=DEVICE)
        _check(input, logit, torch.empty(shape[0], shape[1], 4, 4, device=DEVICE), RESNET)


@pytest.mark.parametrize("shape", [(1, 2, 0, 5), (1, 2, 5, 0)])
def test_windows_over_no_pixel_are_refused(shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape, device=DEVICE)
    with pytest.raises(RuntimeError, match="input: expected at least one row and one column"):
        forward(empty, empty, [2, 2], [1, 1], [1, 1], False)


def test_windows_beyond_a_small_image() -> None:
    for geometry in (([640, 640], [640, 640], [0, 0], True), ([9, 5], [7, 5], [1, 2], True)):
        input, logit = _random((2, 8, 3, 2), torch.float32, 0), _random((2, 1, 3, 2), torch.float32, 1)
        _check(input, logit, _random((2, 8, 1, 1), torch.float32, 2), geometry)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shared", [False, True])
def test_backward_is_deterministic(layout: str, shared: bool) -> None:
    input = LAYOUTS[layout](_random((4, 32, 40, 40), torch.float32, 0))
    logit = _random((4, 1 if shared else 32, 40, 40), torch.float32, 1)
    output = forward(input, logit, *RESNET)
    first, second = (backward(output, input, logit, output, *RESNET) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients(layout: str, shared: bool) -> None:
    input = LAYOUTS[layout](_random((2, 2, 5, 6), torch.float64, 0)).requires_grad_()
    logit = _random((2, 1 if shared else 2, 5, 6), torch.float64, 1).requires_grad_()

    def pool(input: Tensor, logit: Tensor) -> Tensor:
        return paper_layers.lip_pool2d(input, logit, 3, 2, 1)

    assert torch.autograd.gradcheck(pool, (input, logit))
    assert torch.autograd.gradgradcheck(pool, (input, logit))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    tests = ("test_schema", "test_faketensor")
    input = LAYOUTS[layout](_random((2, 4, 7, 8), dtype, 0))
    for depth in (1, 4):
        logit = _random((2, depth, 7, 8), dtype, 1)
        output = forward(input, logit, *RESNET)
        torch.library.opcheck(forward.default, (input, logit, *RESNET), test_utils=tests)
        torch.library.opcheck(backward.default, (output, input, logit, output, *RESNET), test_utils=tests)


def test_compiles_without_graph_breaks() -> None:
    def loss(input: Tensor) -> Tensor:
        return paper_layers.lip_pool2d(input, 2 * input, 3, 2, 1).square().sum()

    eager = _random((2, 4, 8, 8), torch.float32, 0).requires_grad_()
    compiled = eager.detach().clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_bad_arguments_are_refused_before_memory_is_touched() -> None:
    x = _random((2, 4, 6, 6), torch.float32, 0)
    out = forward(x, x, *RESNET)
    for name, call in {
        "input": lambda: forward(x[0], x[0], *RESNET),
        "logit": lambda: forward(x, x[:, :2], *RESNET),
        "logit: expected the dtype": lambda: forward(x, x.half(), *RESNET),
        "kernel_size": lambda: forward(x, x, [9, 3], [1, 1], [1, 1], False),
        "stride": lambda: forward(x, x, [3, 3], [0, 1], [1, 1], False),
        "padding": lambda: forward(x, x, [3, 3], [1, 1], [2, 2], False),
        "grad": lambda: backward(out[:1], x, x, out, *RESNET),
        "output": lambda: backward(out, x, x, out[..., :1], *RESNET),
        "kernel_size: expected at most": lambda: forward(x, x, [8, 3], [2, 1], [0, 0], True),
        "input: expected float32.* got Int": lambda: forward(x.int(), x.int(), *RESNET),
    }.items():
        with pytest.raises(RuntimeError, match=name):
            call()


def test_mixed_devices_are_refused() -> None:
    x = _random((2, 4, 6, 6), torch.float32, 0)
    out = forward(x, x, *RESNET)
    with pytest.raises(RuntimeError, match="logit: expected the device"):
        forward(x, x.cpu(), *RESNET)
    with pytest.raises(RuntimeError, match="grad: expected the device"):
        backward(out.cpu(), x, x, out, *RESNET)
    with pytest.raises(ValueError, match="logit"):
        paper_layers.lip_pool2d(x, x.cpu(), 3, 2, 1)


def test_runs_on_the_current_stream() -> None:
    x = torch.zeros(8, 64, 56, 56, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # the pool must wait for what comes before it on its own stream
        x.fill_(1.0)
        output = forward(x, x, *RESNET)
        grads = backward(torch.ones_like(output), x, x, output, *RESNET)
    stream.synchronize()
    assert torch.equal(output, torch.ones_like(output))
    torch.testing.assert_close(grads[0].sum(), torch.tensor(float(output.numel()), device=DEVICE))


@pytest.mark.parametrize("shared", [False, True])
def test_graph_capture(shared: bool) -> None:
    shape = (2, 8, 15, 15)
    x, logit = _random(shape, torch.float32, 0), _random((2, 1 if shared else 8, 15, 15), torch.float32, 1)

    def step() -> tuple[Tensor, ...]:
        output = forward(x, logit, *RESNET)
        return output, *backward(output, x, logit, output, *RESNET)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(_random(shape, torch.float32, 3))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_input() -> None:
    x = _random((2, 4, 9, 9), torch.float32, 0).to("cuda:1")
    with torch.cuda.device(0):
        _check(x, x, forward(x, x, *RESNET), RESNET)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shared", [False, True])
def test_more_elements_than_32_bits_count(layout: str, shared: bool) -> None:
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free device memory")
    shape = (33, 8, 2900, 2900)
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    input = torch.empty(shape, device=DEVICE, dtype=torch.float16, memory_format=layouts[layout]).normal_()
    assert input.numel() > 2**31
    logit = input[:, :1].clone() if shared else input
    output = forward(input, logit, *RESNET)
    grads = backward(output, input, logit, output, *RESNET)
    # The last image by itself goes the way of 32 bits.
    last = forward(input[-1:], logit[-1:], *RESNET)
    torch.testing.assert_close(output[-1:], last)
    for got, want in zip(grads, backward(last, input[-1:], logit[-1:], last, *RESNET), strict=True):
        torch.testing.assert_close(got[-1:], want)
