"""The CUDA kernels of split_batch_norm and its steps against the formulas in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paper_layers
from paper_layers.ops.split_batch_norm import formulas
from testing import cuda_battery
from testing.cases import DTYPES
from testing.cuda_battery import DEVICE, CudaBattery, Step, assert_near, dtypes, needs_cuda, needs_memory, offset
from tests.ops import test_split_batch_norm as on_cpu
from tests.ops.test_split_batch_norm import LAYOUTS

pytestmark = needs_cuda

ops = torch.ops.paper_layers


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return cuda_battery.random(*shape, dtype=dtype, seed=seed)


def listed(values: Tensor | None) -> list[Tensor]:
    return [] if values is None else [values]


def _check(x: Tensor, grad: Tensor, sizes: list[int], affine: bool = True, scale: float = 1.0) -> None:
    """All six ops, values and strides; `scale` is that of the tolerance of what sums of the elements make."""
    dtype, sums = x.dtype, torch.promote_types(x.dtype, torch.float32)
    weight, bias = random((2, len(sizes), x.shape[1]), sums, 9) if affine else (None, None)
    eps = 1e-3

    def close(got: Tensor, want: Tensor, scale: float) -> None:
        assert_near(got, want, got.dtype, rtol=scale, atol=scale)

    def exact(*tensors: Tensor | None) -> list[Any]:
        return [None if t is None else t.cpu().double() for t in tensors]

    output, mean, var = ops.split_batch_norm(x, listed(weight), listed(bias), sizes, eps)
    want = formulas.statistics(*exact(x), sizes)
    close(mean, want[0], 1.0)
    close(var, want[1], 1.0)
    assert (output.dtype, mean.dtype) == (dtype, sums)
    close(output, formulas.normalize(*exact(x, weight, bias), *want, sizes, eps), scale)
    assert output.stride() == (x.stride() if formulas.is_channels_last(x) else x.contiguous().stride())
    for got, same in zip(ops.split_batch_norm_statistics(x, sizes), (mean, var), strict=True):
        assert torch.equal(got, same)
    again = ops.split_batch_norm_normalize(x, weight, bias, mean, var, sizes, eps)
    close(again, formulas.normalize(*exact(x, weight, bias, mean, var), sizes, eps), scale)

    grad_input, *lists = ops.split_batch_norm_backward(grad, x, listed(weight), mean, var, 1, sizes, eps)
    if weight is None:
        lists[0] = [ops.split_batch_norm_backward_sums(grad, x, mean, var, sizes, eps)[0]]
    products, total = (values[0].view(len(sizes), -1) for values in lists)
    want = formulas.backward_sums(*exact(grad, x, mean, var), sizes, eps)
    count = x.numel() // x.shape[1] if x.shape[1] else 1
    close(products, want[0], scale * count**0.5)
    close(total, want[1], scale * count**0.5)
    for got, same in zip(
        ops.split_batch_norm_backward_sums(grad, x, mean, var, sizes, eps), (products, total), strict=True
    ):
        assert torch.equal(got, same)
    counts = torch.tensor(sizes)[:, None] * x.shape[2]
    means = [values / counts for values in want]
    want_input = formulas.backward_input(*exact(grad, x, weight, mean, var), *means, sizes, eps)
    close(grad_input, want_input, 10 * scale)
    assert grad_input.stride() == output.stride()
    given_means = [values.to(DEVICE, sums) for values in means]
    got = ops.split_batch_norm_backward_input(grad, x, weight, mean, var, *given_means, sizes, eps)
    close(got, want_input, 10 * scale)


LAYOUTS_3D = {
    **{name: LAYOUTS[name] for name in ("contiguous", "channels_last", "reversed", "expanded")},
    "offset": lambda x: offset(x.contiguous()),
    "offset_channels_last": lambda x: offset(LAYOUTS["channels_last"](x)),
}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=3),
    channels=st.sampled_from([1, 2, 3, 4, 12, 17, 64, 200]),
    pixels=st.sampled_from([1, 2, 4, 7, 64, 225]),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS_3D))] * 2),
    affine=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matches_formulas(
    sizes: list[int], channels: int, pixels: int, dtype: torch.dtype, layouts: Any, affine: bool, seed: int
) -> None:
    shape = (sum(sizes), channels, pixels)
    x, grad = (LAYOUTS_3D[name](random(shape, dtype, seed + i)) for i, name in enumerate(layouts))
    _check(x, grad, sizes, affine)


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(20, 64, 3136), (9, 7, 50001), (64, 1030, 49), (5000, 12, 1)])
def test_many_blocks(dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    x = LAYOUTS[layout](random(shape, dtype, 0) + 3)
    _check(x, LAYOUTS[layout](random(shape, dtype, 1)), [shape[0] // 3, shape[0] - shape[0] // 3])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_splits_than_a_launch_takes(layout: str) -> None:
    sizes = [1 + i % 3 for i in range(35)]
    x = LAYOUTS[layout](random((sum(sizes), 12, 8), torch.float32, 0))
    _check(x, x.cos(), sizes)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 8, 3600), (6, 3, 101), (300, 20, 1)])
def test_large_offset(shape: tuple[int, ...], layout: str) -> None:
    """Means of 1e4 and variances of 1 in float32, where a sum of squares would leave no digit."""
    x = LAYOUTS[layout](random(shape, torch.float32, 0) + 1e4)
    sizes = [shape[0] // 3, shape[0] - shape[0] // 3]
    output, mean, var = ops.split_batch_norm(x, [], [], sizes, 1e-5)
    exact = x.cpu().double()
    want_mean, want_var = formulas.statistics(exact, sizes)
    torch.testing.assert_close(mean.cpu().double(), want_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.cpu().double(), want_var, rtol=1e-5, atol=0)
    want = formulas.normalize(exact, None, None, want_mean, want_var, sizes, 1e-5)
    torch.testing.assert_close(output.cpu().double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_extremes_stay_in_their_channel_and_split(layout: str, value: float) -> None:
    x = LAYOUTS[layout](random((6, 20, 63), torch.float32, 0))
    expected = ops.split_batch_norm(x, [], [], [2, 2, 2], 1e-5)[0]
    x[3, 17, 4] = value
    output = ops.split_batch_norm(x, [], [], [2, 2, 2], 1e-5)[0]
    assert output[2:4, 17].isnan().all()
    output[2:4, 17] = expected[2:4, 17]
    assert torch.equal(output, expected)


@pytest.mark.parametrize("shape", [(0, 3, 8), (4, 0, 8), (4, 3, 0), (4, 20, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    x, sizes = torch.zeros(shape, device=DEVICE), [shape[0] // 4, shape[0] - shape[0] // 4]
    output, mean, var = ops.split_batch_norm(x, [], [], sizes, 1e-5)
    grad, _, (bias,) = ops.split_batch_norm_backward(x, x, [], mean, var, 1, sizes, 1e-5)
    assert output.shape == grad.shape == shape
    assert mean.shape == var.shape == bias.shape == (2, shape[1])
    assert not bias.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layer_equals_torch(layout: str) -> None:
    """As two batch norms of torch, under autocast, with an activation in place behind."""
    norm = paper_layers.SplitBatchNorm2d(16, device=DEVICE)
    plain = [torch.nn.BatchNorm2d(16, device=DEVICE) for _ in range(2)]
    x = LAYOUTS[layout](random((8, 16, 9, 7), torch.float16, 0)).requires_grad_()
    with torch.autocast(DEVICE):
        output = torch.nn.functional.relu_(norm(x))
    want = torch.cat([one(part) for one, part in zip(plain, x.split(4), strict=True)]).relu()
    torch.testing.assert_close(output, want)
    grads = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (output, want)]
    torch.testing.assert_close(*grads)
    assert output.stride() == grads[0].stride() == x.stride()
    for one, other in zip(norm.split_norms, plain, strict=True):
        torch.testing.assert_close(one.running_mean, other.running_mean)
        torch.testing.assert_close(one.running_var, other.running_var)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_elements_than_32_bits_count(layout: str) -> None:
    needs_memory(40)
    x = torch.empty((5, 2**16, 2**13) if layout == "contiguous" else (5, 2**13, 2**16), device=DEVICE, dtype=torch.half)
    x = (x if layout == "contiguous" else x.mT).normal_()
    assert x.numel() > 2**31
    output, mean, var = ops.split_batch_norm(x, [], [], [4, 1], 1e-5)
    weight = [torch.ones(2, x.shape[1], device=DEVICE)]
    grad, *grads = ops.split_batch_norm_backward(output, x, weight, mean, var, 1, [4, 1], 1e-5)
    # The last image by itself goes the way of 32 bits.
    last, *moments = ops.split_batch_norm(x[4:], [], [], [1], 1e-5)
    torch.testing.assert_close(output[4:], last)
    want, *sums = ops.split_batch_norm_backward(last, x[4:], [weight[0][:1]], *moments, 1, [1], 1e-5)
    for got, of_last in zip((grad, *(g[0] for g in grads)), (want, *(s[0] for s in sums)), strict=True):
        torch.testing.assert_close(got[-1:], of_last, rtol=1e-3, atol=1e-2)


class TestSplitBatchNormOnDevice(CudaBattery, on_cpu.TestSplitBatchNorm):
    test_number_out_of_range_is_an_assertion = None  # The op takes no indices.

    def steps(self) -> dict[str, Step]:
        def inputs(seed: int, layout: str) -> tuple[Tensor, ...]:
            x, grad = (LAYOUTS[layout](random((32, 48, 400), torch.float32, seed + i)) for i in range(2))
            return x, grad, random((2, 48), torch.float32, seed)

        def function(x: Tensor, grad: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            output, mean, var = ops.split_batch_norm(x, [], [bias], [16, 16], 1e-5)
            grad, _, sums = ops.split_batch_norm_backward(grad, x, [], mean, var, 1, [16, 16], 1e-5)
            return output, mean, var, grad, *sums

        return {a: Step(partial(inputs, layout=a), function) for a in ("contiguous", "channels_last")}

    def refused(self) -> dict[str, Callable[[], Any]]:
        x = random((4, 3, 6), torch.float32, 0)
        _, mean, var = ops.split_batch_norm(x, [], [], [1, 3], 1e-5)
        return {
            "input: expected shape": lambda: ops.split_batch_norm(x[0, 0], [], [], [1, 2], 1e-5),
            "split_sizes": lambda: ops.split_batch_norm(x, [], [], [1, 2], 1e-5),
            "weight": lambda: ops.split_batch_norm(x, [mean[:1]], [], [1, 3], 1e-5),
            "grad": lambda: ops.split_batch_norm_backward(x[:1], x, [], mean, var, 1, [1, 3], 1e-5),
            "var": lambda: ops.split_batch_norm_backward(x, x, [], mean, var[:, :2], 1, [1, 3], 1e-5),
        }

    def refused_devices(self) -> dict[str, Callable[[], Any]]:
        x, bias = random((4, 3, 6), torch.float32, 0), torch.zeros(2, 3)
        return {"bias: expected the device": lambda: ops.split_batch_norm(x, [], [bias], [1, 3], 1e-5)}
