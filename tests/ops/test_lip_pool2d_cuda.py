"""The CUDA kernels of lip_pool2d against the formula in float64 on the CPU."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paper_layers
from testing import cuda_battery
from testing.cases import DTYPES
from testing.cuda_battery import DEVICE, CudaBattery, Step, assert_near, dtypes, needs_cuda, needs_memory, offset
from tests.ops import test_lip_pool2d as on_cpu

op = importlib.import_module("paper_layers.ops.lip_pool2d")  # The package has a function of this name.

pytestmark = needs_cuda

Geometry = tuple[list[int], list[int], list[int], bool]
RESNET: Geometry = ([3, 3], [2, 2], [1, 1], False)
DENSENET: Geometry = ([2, 2], [2, 2], [0, 0], False)

forward = torch.ops.paper_layers.lip_pool2d
backward = torch.ops.paper_layers.lip_pool2d_backward


LAYOUTS = {
    **cuda_battery.LAYOUTS,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "offset_channels_last": lambda x: offset(x.contiguous(memory_format=torch.channels_last)),
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
    for name, got, want in zip(("output", "grad_input", "grad_logit"), (output, *grads), expected, strict=True):
        assert (got.dtype, got.device) == (input.dtype, input.device)
        assert got.is_contiguous(memory_format=layout), f"{name}: {got.stride()} is not {layout}"
        # A shared logit's gradient is a sum over channels, so its error grows with theirs.
        scale = input.shape[1] if want.shape[1] != input.shape[1] else 1
        assert_near(got, want, input.dtype, atol=max(1, scale), name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 8])
def test_half_gradients_of_images_far_from_zero(dtype: torch.dtype, layout: str, channels: int) -> None:
    """The gradients of a window's logits cancel: they are about averages that no half type has rounded."""
    input = LAYOUTS[layout]((8 + random((2, 8, 20, 20), torch.float32, 0) / 4).to(dtype))
    logit, geometry = random((2, channels, 20, 20), dtype, 1), ([15, 15], [1, 1], [0, 0], False)
    output = forward(input, logit, *geometry)
    grad = torch.ones_like(output)
    x, y = input.cpu().double(), logit.cpu().double()
    expected = op._backward_reference(grad.cpu().double(), x, y, op._reference(x, y, *geometry), *geometry)
    for got, want in zip(backward(grad, input, logit, output, *geometry), expected, strict=True):
        assert (got.cpu().double() - want).abs().max() < 5e-3 * want.abs().max()


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (scale * cuda_battery.random(*shape, seed=seed)).to(dtype)


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

    input = LAYOUTS[draw(layouts)](random((batch, channels, *size), dtype, seed))
    depth = draw(st.sampled_from([1, channels]))
    scale = draw(st.sampled_from([1.0, 30.0, 1e4]))
    logit = LAYOUTS[draw(layouts)](random((batch, depth, *size), dtype, seed + 1, scale))
    geometry = (kernel, stride, padding, ceil_mode)
    shape = tuple(op._output_shape(input, *geometry))
    grad = LAYOUTS[draw(layouts)](random(shape, dtype, seed + 2))
    return input, logit, grad, geometry


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_problems())
def test_matches_reference(problem: tuple[Tensor, Tensor, Tensor, Geometry]) -> None:
    _check(*problem)


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("geometry", [RESNET, DENSENET, ([5, 3], [3, 2], [2, 1], True)])
def test_many_blocks(dtype: torch.dtype, layout: str, shared: bool, geometry: Geometry) -> None:
    input = LAYOUTS[layout](random((3, 20, 57, 63), dtype, 0))
    logit = random((3, 1 if shared else 20, 57, 63), dtype, 1, 3.0)
    _check(input, logit, random(tuple(op._output_shape(input, *geometry)), dtype, 2), geometry)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("geometry", [RESNET, ([2, 2], [3, 3], [1, 1], False)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_extremes_stay_in_their_windows(layout: str, geometry: Geometry, value: float) -> None:
    shape = (2, 4, 9, 9)
    grad = random(tuple(op._output_shape(torch.empty(shape), *geometry)), torch.float32, 2)
    for spoiled in range(3):
        tensors = [random(shape, torch.float32, 0), random(shape, torch.float32, 1), grad]
        tensors[spoiled][0, 1, 3, 2] = value
        tensors[spoiled][1, 2, 0, 0] = value
        input, logit, upstream = (LAYOUTS[layout](x) for x in tensors)
        _check(input, logit, upstream, geometry)
    everywhere = torch.full(shape, value, device=DEVICE)
    _check(LAYOUTS[layout](random(shape, torch.float32, 0)), everywhere, grad, geometry)


def test_uncovered_positions_get_zero_gradients() -> None:
    geometry: Geometry = ([1, 2], [3, 4], [0, 0], False)
    input = random((1, 3, 8, 11), torch.float32, 0)
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
        input, logit = random((2, 8, 3, 2), torch.float32, 0), random((2, 1, 3, 2), torch.float32, 1)
        _check(input, logit, random((2, 8, 1, 1), torch.float32, 2), geometry)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shared", [False, True])
def test_more_elements_than_32_bits_count(layout: str, shared: bool) -> None:
    needs_memory(60)
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


class TestLIPPool2dOnDevice(CudaBattery, on_cpu.TestLIPPool2d):
    op_dtypes = tuple(DTYPES)
    test_number_out_of_range_is_an_assertion = None  # The op takes no indices.

    def steps(self) -> dict[str, Step]:
        def inputs(seed: int, layout: str, channels: int) -> tuple[Tensor, ...]:
            input = LAYOUTS[layout](random((4, 32, 40, 40), torch.float32, seed))
            return input, random((4, channels, 40, 40), torch.float32, seed + 1)

        def function(input: Tensor, logit: Tensor) -> tuple[Tensor, ...]:
            output = forward(input, logit, *RESNET)
            return output, *backward(output, input, logit, output, *RESNET)

        forms = itertools.product(["contiguous", "channels_last"], [1, 32])
        return {f"{a} {n}": Step(partial(inputs, layout=a, channels=n), function) for a, n in forms}

    def refused(self) -> dict[str, Callable[[], Any]]:
        x = random((2, 4, 6, 6), torch.float32, 0)
        out = forward(x, x, *RESNET)
        return {
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
        }

    def refused_devices(self) -> dict[str, Callable[[], Any]]:
        x = random((2, 4, 6, 6), torch.float32, 0)
        out = forward(x, x, *RESNET)
        return {
            "logit: expected the device": lambda: forward(x, x.cpu(), *RESNET),
            "grad: expected the device": lambda: backward(out.cpu(), x, x, out, *RESNET),
            "logit": lambda: paper_layers.lip_pool2d(x, x.cpu(), 3, 2, 1),
        }
