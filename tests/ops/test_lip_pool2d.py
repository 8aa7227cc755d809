from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paper_layers import lip_pool2d
from testing.battery import OpBattery
from testing.cases import Case, assert_close, by_dtype, drawn


def geometry(kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False) -> tuple[Any, ...]:
    def both(value: Any) -> list[int]:
        return list(value) if isinstance(value, tuple) else [value, value]

    return both(kernel_size), both(kernel_size if stride is None else stride), both(padding), ceil_mode


def formula(input: Tensor, logit: Tensor, **options: Any) -> Tensor:
    """Equation 1 window by window, from unfolded images: a way of its own to compute it."""
    kernel, stride, padding, ceil_mode = geometry(**options)
    shape = F.avg_pool2d(torch.empty(1, 1, *input.shape[-2:]), kernel, stride, padding, ceil_mode).shape[2:]
    sides = zip(shape, input.shape[-2:], kernel, stride, padding, strict=True)
    after = [max(0, (n - 1) * s + k - length - p) for n, length, k, s, p in sides]
    pad = [padding[1], after[1], padding[0], after[0]]
    batch = input.shape[:-3]

    def windows(images: Tensor, value: float) -> Tensor:
        padded = F.pad(images, pad, value=value)
        taps = padded.unfold(-2, kernel[0], stride[0]).unfold(-2, kernel[1], stride[1])
        return taps.flatten(-2)[..., : shape[0], : shape[1], :]

    logits = windows(logit, -torch.inf)
    weight = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    output = (weight * windows(input, 0.0)).sum(-1) / weight.sum(-1)
    return output.expand(*batch, *output.shape[-3:])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    stride = draw(st.one_of(st.sampled_from([(1, 1), (2, 2), (3, 3)]), st.tuples(st.integers(1, 7), st.integers(1, 7))))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    ceil_mode = draw(st.booleans())
    # With ceil_mode a window may be larger than its padded image.
    sides = zip(kernel, stride, padding, strict=True)
    smallest = [max(1, k - 2 * p - (s - 1) * ceil_mode) for k, s, p in sides]
    height, width = (draw(st.one_of(st.just(n), st.integers(n, 40))) for n in smallest)
    images = draw(st.integers(0, 3))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "channels_last", "expanded", "offset", "transposed"]))
    # From 16 on, channels_last has kernels of its own.
    channels = draw(st.sampled_from([3, 16, 17, 33] if layout == "channels_last" else [1, 2, 3, 8, 17]))
    shared = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    input = torch.randn(images, channels, height, width, generator=generator)
    logit = torch.randn(images, 1 if shared else channels, height, width, generator=generator)
    # Ordinary logits, far from zero, so far apart that sums underflow, beyond exp's range, ties, masks.
    change = [
        lambda t: t,
        lambda t: t - 1000,
        lambda t: 60 * t,
        lambda t: 2e4 * t,
        lambda t: 4 * (3 * t).round(),
        lambda t: 0 * t,
        lambda t: t.masked_fill(t < -1.5, -3e4),
    ]
    logit = draw(st.sampled_from(change))(logit)
    if layout == "channels_last":
        input, logit = (t.contiguous(memory_format=torch.channels_last) for t in (input, logit))
    elif layout == "expanded":
        input = input[..., :1].expand(images, channels, height, width)
    elif layout == "offset":
        input = F.pad(input, (3, 2, 1, 0))[..., 1:, 3:-2]
    elif layout == "transposed":
        logit = logit.mT.contiguous().mT
    options = {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    return Case((input, logit), options)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def call(**change: Any) -> Any:
    arguments = {"input": images(2, 4, 8, 8), "logit": images(2, 4, 8, 8), "kernel_size": 3, **change}
    return lambda: lip_pool2d(**arguments)


class TestLIPPool2d(OpBattery):
    function = staticmethod(lip_pool2d)
    formula = staticmethod(formula)
    cases = staticmethod(cases)
    ops = {  # noqa: RUF012
        "lip_pool2d": torch.ops.paper_layers.lip_pool2d.default,
        "lip_pool2d_backward": torch.ops.paper_layers.lip_pool2d_backward.default,
    }
    bad_inputs = {  # noqa: RUF012
        "rank": (call(input=images(8, 8)), ValueError, r"input: expected shape .*got \(8, 8\)"),
        "logit shape": (call(logit=images(2, 4, 8, 7)), ValueError, r"logit: expected .*got \(2, 4, 8, 7\)"),
        "logit channels": (call(logit=images(2, 3, 8, 8)), ValueError, "logit: expected"),
        "logit rank": (call(logit=images(4, 8, 8)), ValueError, "logit: expected"),
        "not a tensor": (call(logit=3.0), TypeError, "logit: expected a Tensor, got float"),
        "integers": (call(input=torch.ones(2, 4, 8, 8, dtype=torch.int64)), TypeError, "input: .*torch.int64"),
        "complex": (call(logit=images(2, 4, 8, 8) * 1j), TypeError, "logit: .*complex"),
        "devices": (call(logit=images(2, 4, 8, 8).to("meta")), ValueError, "logit: .*cpu, got meta"),
        "kernel zero": (call(kernel_size=0), ValueError, "kernel_size: expected at least 1, got 0"),
        "kernel type": (call(kernel_size=3.0), TypeError, "kernel_size: .*got 3.0"),
        "kernel triple": (call(kernel_size=(3, 3, 3)), TypeError, "kernel_size: .*pair"),
        "kernel too large": (call(kernel_size=(3, 9)), ValueError, r"kernel_size: .*width, 8, got \(3, 9\)"),
        "stride zero": (call(stride=(2, 0)), ValueError, r"stride: expected at least 1, got \(2, 0\)"),
        "padding negative": (call(padding=-1), ValueError, "padding: expected at least 0, got -1"),
        "padding large": (call(padding=2), ValueError, "padding: expected at most half of kernel_size 3, got 2"),
        "kernel too large for ceil_mode": (
            call(kernel_size=(3, 10), stride=(1, 2), ceil_mode=True),
            ValueError,
            r"kernel_size: expected at most the padded width plus stride - 1, 9, got \(3, 10\)",
        ),
        "no pixels": (call(input=images(2, 4, 0, 8), logit=images(2, 4, 0, 8)), ValueError, "kernel_size"),
        "no pixels but padding": (
            call(input=images(2, 4, 8, 0), logit=images(2, 4, 8, 0), kernel_size=2, padding=1),
            ValueError,
            r"input: expected at least one row and one column, got \(2, 4, 8, 0\)",
        ),
    }

    @staticmethod
    def fixed_cases() -> list[Case]:
        last = torch.channels_last
        return [
            Case((images(2, 3, 7, 9), images(2, 3, 9, 7).mT), {"kernel_size": 3, "stride": 2, "padding": 1}),
            Case(
                (images(2, 3, 6, 5), images(2, 1, 6, 5)), {"kernel_size": (2, 3), "stride": (3, 1), "ceil_mode": True}
            ),
            Case(
                (images(1, 4, 6, 5).to(memory_format=last), images(1, 4, 5, 6).mT.to(memory_format=last)),
                {"kernel_size": 3, "stride": 2, "padding": 1},
            ),
            Case((images(2, 2, 6, 5).to(memory_format=last), images(2, 1, 6, 5)), {"kernel_size": 3, "stride": 2}),
            Case((images(3, 6, 5), images(1, 6, 5)), {"kernel_size": 2}),
        ]

    @staticmethod
    def op_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
        input, logit = (t if t.dim() == 4 else t[None] for t in case.tensors)
        options = geometry(**case.options)
        output = torch.ops.paper_layers.lip_pool2d(input, logit, *options)
        return {
            "lip_pool2d": (input, logit, *options),
            "lip_pool2d_backward": (torch.ones_like(output), input, logit, output, *options),
        }


@by_dtype
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["input", "logit"])
def test_non_finite_stays_in_its_windows(
    dtype: torch.dtype, layout: torch.memory_format, value: float, where: str
) -> None:
    tensors = {"input": images(1, 4, 11, 40).to(dtype), "logit": images(1, 4, 11, 41)[..., :40].to(dtype)}
    tensors = {name: t.contiguous(memory_format=layout) for name, t in tensors.items()}
    options = {"kernel_size": 3, "stride": (2, 4), "padding": 1}

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        output = lip_pool2d(*leaves, **options)
        return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]

    clean = run()
    rows, columns = 5, slice(16, 17)  # (5, 16) is held by windows (2, 4) and (3, 4); row 5 by rows 2 and 3
    tensors[where][0, 1, rows, columns] = value
    dirty = run()
    output_mask = torch.zeros(clean[0].shape, dtype=torch.bool)
    output_mask[0, 1, 2:4, 4] = True
    input_mask = torch.zeros(clean[1].shape, dtype=torch.bool)
    input_mask[0, 1, 3:8, 15:18] = True
    for before, after, mask in zip(clean, dirty, (output_mask, input_mask, input_mask), strict=True):
        assert torch.equal(before[~mask], after[~mask])
    if where == "logit" and value == -torch.inf:  # a mask: weight zero
        assert all(t.isfinite().all() for t in dirty)
        assert dirty[1][0, 1, 5, 16] == 0
    else:
        assert not dirty[0][output_mask].isfinite().any()


def test_non_finite_where_no_window_reaches() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        input, logit = images(1, 3, 9, 9).to(memory_format=layout), images(1, 3, 9, 9).to(memory_format=layout) * 2
        for tensor in (input, logit):
            tensor[:, :, 2::3] = torch.nan
            tensor[..., 2::3] = torch.inf
        leaves = (input.requires_grad_(), logit.requires_grad_())
        output = lip_pool2d(*leaves, kernel_size=2, stride=3)
        assert output.isfinite().all()
        for grad in torch.autograd.grad(output.sum(), leaves):
            assert grad.isfinite().all()
            assert not grad[:, :, 2::3].any()


def test_window_of_masks_only_is_nan() -> None:
    logit = torch.zeros(1, 1, 4, 4)
    logit[..., :2, :2] = -torch.inf
    output = lip_pool2d(torch.ones(1, 1, 4, 4), logit, 2)
    assert output.isnan().tolist() == [[[[True, False], [False, False]]]]


@given(offset=st.sampled_from([-3e4, -100.0, 0.0, 88.0, 1000.0, 3e4]), spread=st.sampled_from([0.1, 10.0, 1e4, 1e30]))
@drawn
def test_any_finite_logits(offset: float, spread: float) -> None:
    input, logit = images(2, 3, 12, 20), (images(2, 3, 20, 12).mT * spread + offset)
    options = {"kernel_size": 3, "stride": 2, "padding": 1}
    leaves = Case((input, logit)).leaves()
    exact = Case((input, logit)).to(torch.float64).leaves()
    actual, expected = lip_pool2d(*leaves, **options), formula(*exact, **options)
    assert_close(actual, expected, torch.float32)
    for got, want in zip(
        torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert_close(got, want, torch.float32, scale=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 64, 180, 190), (1, 40, 9, 700), (2, 3, 9, 18000), (1, 1, 500, 40)])
def test_large(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> None:
    """Images of several blocks and tiles, whose logits drift so far that blocks differ, and past the caches."""
    drift = torch.linspace(-150, 150, shape[2])[:, None] + torch.linspace(0, 40, shape[3])
    case = Case((images(*shape), 2 * images(*shape).flip(-1) + drift), {"kernel_size": 3, "stride": 2, "padding": 1})
    case = Case(tuple(t.to(dtype).contiguous(memory_format=layout) for t in case.tensors), case.options)
    leaves, exact = case.leaves(), case.to(torch.float64).leaves()
    actual, expected = lip_pool2d(*leaves, **case.options), formula(*exact, **case.options)
    assert_close(actual, expected, dtype)
    grad = images(*expected.shape).to(dtype)
    for got, want in zip(
        torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        assert_close(got, want, dtype, scale=8)


def test_special_logits() -> None:
    """Constant logits are average pooling, steep ones max pooling, one-hot ones subsampling."""
    input = images(2, 3, 12, 12)
    average = F.avg_pool2d(input, 3, 2, 1, count_include_pad=False)
    torch.testing.assert_close(lip_pool2d(input, torch.full_like(input, 7.0), 3, 2, 1), average)
    torch.testing.assert_close(lip_pool2d(input, 1e6 * input, 3, 2, 1), F.max_pool2d(input, 3, 2, 1))
    one_hot = torch.full((2, 1, 12, 12), -torch.inf)
    one_hot[..., ::2, ::2] = 0
    torch.testing.assert_close(lip_pool2d(input, one_hot, 3, 2, 1), input[..., ::2, ::2])


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    leaves = (torch.zeros(shape, requires_grad=True), torch.zeros(shape, requires_grad=True))
    output = lip_pool2d(*leaves, kernel_size=3, stride=2, padding=1)
    assert output.shape == (*shape[:2], 4, 4)
    assert [g.shape for g in torch.autograd.grad(output.sum(), leaves)] == [shape, shape]


def test_memory_saved_for_backward() -> None:
    """Input and logit, and nothing else."""
    input, logit = (torch.randn(2, 8, 32, 32, requires_grad=True) for _ in range(2))
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = lip_pool2d(input, logit, 3, 2, 1)
    assert output.requires_grad
    assert set(saved) == {t.untyped_storage().data_ptr() for t in (input, logit)}


@pytest.mark.cpu_only
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@by_dtype
def test_bitwise_equal_for_any_number_of_threads_and_images(
    dtype: torch.dtype, layout: torch.memory_format, shared: bool
) -> None:
    """Whatever the logits: where they are far apart, windows differ in how they are computed."""
    shapes = [
        ((1, 2, 131, 67), geometry(3, 2, 1)),
        ((1, 1, 83, 61), geometry(7, 3, 3, True)),
        ((2, 17, 45, 20), geometry(3)),
    ]
    threads = torch.get_num_threads()
    for (shape, options), deviation in itertools.product(shapes, (20, 300)):
        input = images(*shape).to(dtype).contiguous(memory_format=layout)
        logit = deviation * images(*reversed(shape)).permute(3, 2, 1, 0)
        logit = (logit[:, :1] if shared else logit).to(dtype).contiguous(memory_format=layout)

        def run(input: Tensor, logit: Tensor, options: Any = options) -> tuple[Tensor, ...]:
            output = torch.ops.paper_layers.lip_pool2d(input, logit, *options)
            return output, *torch.ops.paper_layers.lip_pool2d_backward(output, input, logit, output, *options)

        try:
            results = []
            for number in (1, 2, 3, 4, 8):
                torch.set_num_threads(number)
                results.append(run(input, logit))
            alone = [run(input[i : i + 1], logit[i : i + 1]) for i in range(len(input))]
        finally:
            torch.set_num_threads(threads)
        results.append(tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: images(4, 8, 8)}, "input: expected shape"),
        ({1: images(2, 3, 8, 8)}, "logit: expected shape"),
        ({1: images(2, 4, 8, 8).double()}, "logit: expected the dtype"),
        ({2: [3, 11]}, "kernel_size: expected at most"),
        ({2: [3]}, "kernel_size: expected two"),
        ({3: [0, 1]}, "stride: expected"),
        ({4: [2, 2]}, "padding: expected at most half"),
        ({2: [3, 12], 5: True}, "kernel_size: expected at most the padded input plus stride - 1, 11"),
        ({0: images(2, 4, 0, 8), 1: images(2, 4, 0, 8), 2: [2, 2]}, "input: expected at least one row"),
    ],
)
def test_kernels_check_again(change: dict[int, Any], message: str) -> None:
    """The op itself, called past the public function, refuses what would be read out of bounds."""
    arguments = [images(2, 4, 8, 8), images(2, 4, 8, 8), [3, 3], [2, 2], [1, 1], False]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.paper_layers.lip_pool2d(*arguments)


def test_backward_kernel_checks_grad_and_output() -> None:
    x, options = images(2, 4, 8, 8), geometry(3, 2, 1)
    backward = torch.ops.paper_layers.lip_pool2d_backward
    with pytest.raises(RuntimeError, match="grad: expected shape"):
        backward(images(2, 4, 4, 3), x, x, images(2, 4, 4, 4), *options)
    with pytest.raises(RuntimeError, match="grad: expected the dtype"):
        backward(images(2, 4, 4, 4).double(), x, x, images(2, 4, 4, 4), *options)
    with pytest.raises(RuntimeError, match="output: expected shape"):
        backward(images(2, 4, 4, 4), x, x, images(2, 4, 4, 3), *options)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("channels", [1, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_steep_windows_are_summed_in_float32(dtype: torch.dtype, channels: int, shared: bool) -> None:
    """A pixel that is all of 961 windows, beside one so large that these are computed one by one."""
    input = images(1, channels, 61, 150).to(dtype).contiguous(memory_format=torch.channels_last)
    logit = torch.full((1, 1 if shared else channels, 61, 150), -100.0, dtype=dtype)
    logit[..., 30, 30] = 0
    logit[..., 30, 120] = 1000
    leaves = Case((input, logit)).leaves()
    output = lip_pool2d(*leaves, kernel_size=31, stride=1)
    grad_input, _ = torch.autograd.grad(output.sum(), leaves)
    assert torch.equal(grad_input[..., 30, 30], torch.full((1, channels), 961.0).to(dtype))
