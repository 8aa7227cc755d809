from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from paper_layers import split_batch_norm
from paper_layers.ops.split_batch_norm import op as module
from testing.battery import OpBattery
from testing.cases import Case, assert_close, by_dtype

NAMES = ("", "_training_", "_backward", "_statistics", "_normalize", "_backward_sums", "_backward_input")
OPS: dict[str, Any] = {
    f"split_batch_norm{name}": getattr(torch.ops.paper_layers, f"split_batch_norm{name}").default for name in NAMES
}


def moments(part: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,)."""
    values = part.transpose(0, 1).flatten(1)
    mean = values.mean(1)
    return mean, (values - mean[:, None]).square().mean(1)


def formula(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    split_sizes: list[int],
    eps: float = 1e-5,
) -> Tensor:
    """Each part by itself, from the definition."""
    outputs = []
    for i, part in enumerate(input.split(split_sizes)):
        shape = (-1, *[1] * (input.dim() - 2))
        mean, var = (values.view(shape) for values in moments(part))
        output = (part - mean) / (var + eps).sqrt()
        output = output if weight is None else output * weight[i].view(shape)
        outputs.append(output if bias is None else output + bias[i].view(shape))
    return torch.cat(outputs)


def channels_last(x: Tensor) -> Tensor:
    """Channels side by side in memory, whatever the rank."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": channels_last,
    "offset": lambda x: F.pad(x, (3, 2))[..., 3:-2],
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "reversed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    split_sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=3))
    # One plane longer than a block of the planar kernel, rows of more and less than a vector, parts of several chunks.
    space = draw(st.sampled_from([(), (1,), (7,), (2, 3), (9, 5), (1, 4), (33, 31), (66, 65), (2, 3, 4)]))
    few = len(space) == 2 and space[0] > 9
    channels = draw(st.sampled_from([1, 3, 17] if few else [1, 2, 15, 16, 17, 40, 131]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    input = torch.randn(sum(split_sizes), channels, *space, generator=generator)
    # Without this, the smallest variance of a few values magnifies all other rounding.
    input = input + torch.tensor([-1.0, 1.0]).repeat(len(input))[: len(input)].view(-1, *[1] * (input.dim() - 1))
    input = draw(st.sampled_from([lambda t: t, lambda t: 30 * t + 100]))(input)
    input = LAYOUTS[draw(st.sampled_from([*LAYOUTS, "channels_last"]))](input)
    parameters = torch.randn(2, len(split_sizes), channels, generator=generator) + 1
    options = {"split_sizes": split_sizes, "eps": draw(st.sampled_from([1e-5, 0.1]))}
    return Case((input, *parameters[: draw(st.integers(0, 2))]), options)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def call(**change: Any) -> Any:
    arguments = {"input": images(6, 4, 3, 3), "split_sizes": [2, 4], **change}
    return lambda: split_batch_norm(**arguments)


class TestSplitBatchNorm(OpBattery):
    @staticmethod
    def function(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **options: Any) -> Tensor:
        return split_batch_norm(input, weight=weight, bias=bias, **options)

    formula = staticmethod(formula)
    cases = staticmethod(cases)
    ops = OPS
    grad_scale = 16.0
    bad_inputs = {  # noqa: RUF012
        "rank": (call(input=images(6)), ValueError, r"input: expected shape \(N, C, \.\.\.\), got \(6,\)"),
        "integers": (call(input=torch.ones(6, 4, dtype=torch.int64)), TypeError, "input: .*torch.int64"),
        "not a tensor": (call(input=3.0), TypeError, "input: expected a Tensor, got float"),
        "no sizes": (call(split_sizes=[]), TypeError, "split_sizes: expected at least one int"),
        "float sizes": (call(split_sizes=[0.5, 0.5]), TypeError, "split_sizes: expected at least one int"),
        "sum": (call(split_sizes=[2, 3]), ValueError, r"split_sizes: expected sizes that sum to the batch, 6, got"),
        "negative": (call(split_sizes=[8, -2]), ValueError, "split_sizes: expected at least 0, got -2"),
        "one value": (call(input=images(6, 4), split_sizes=[5, 1]), ValueError, "at least 2 values per channel"),
        "weight": (call(weight=torch.ones(4)), ValueError, r"weight: expected shape \(2, 4\) or 2 tensors \(4,\)"),
        "biases": (call(bias=[torch.ones(4)]), ValueError, r"bias: expected .*, got \[\(4,\)\]"),
        "dtype": (call(weight=torch.ones(2, 4).half()), TypeError, "weight: expected torch.float32.*float16"),
        "device": (call(bias=torch.ones(2, 4, device="meta")), ValueError, "bias: .*cpu, got meta"),
        "only means": (call(running_mean=torch.ones(2, 4)), ValueError, "running_var: expected to be given"),
        "running shape": (
            call(running_mean=torch.ones(2, 4), running_var=torch.ones(1, 4)),
            ValueError,
            r"running_var: expected shape \(2, 4\)",
        ),
        "eps": (call(eps="small"), TypeError, "eps: expected a number, got 'small'"),
        "momentum": (call(momentum=None), TypeError, "momentum: expected a number, got None"),
    }

    @staticmethod
    def fixed_cases() -> list[Case]:
        two = [images(2, 16), images(2, 16) + 1]
        return [
            Case((channels_last(images(5, 16, 2, 3)), *two), {"split_sizes": [2, 3]}),
            Case((images(6, 3, 2, 2), images(3, 3)), {"split_sizes": [1, 2, 3], "eps": 0.1}),
            Case((images(6, 2),), {"split_sizes": [6]}),
        ]

    @staticmethod
    def op_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
        tensors = (*case.tensors, None, None)
        input, weight, bias = tensors[0].view(*tensors[0].shape[:2], -1), tensors[1], tensors[2]
        # One tensor for all splits or one a split; without weights, gradients of biases.
        weights, biases = (
            [] if t is None else [t] if t is weight and bias is not None else [*t] for t in (weight, bias)
        )
        split_sizes = case.options["split_sizes"]
        options = (split_sizes, case.options.get("eps", 1e-5))
        mean, var = (torch.stack(values) for values in zip(*map(moments, input.split(split_sizes)), strict=True))
        arguments = (
            (input, weights, biases, *options),
            (input, weights, biases, *([*t.clone()] for t in (mean, var)), [], *options, 0.3),
            (input.cos(), input, weights, mean, var, max(1, len(weights)), *options),
            (input, split_sizes),
            (input, weight, bias, mean, var, *options),
            (input.cos(), input, mean, var, *options),
            (input.cos(), input, weight, mean, var, mean / 2, var / 3, *options),
        )
        return dict(zip(OPS, arguments, strict=True))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype: torch.dtype) -> None:
        """Half tensors beside float32 parameters stay half; gradients come back in each tensor's dtype."""
        case = self.placed_cases()[0]
        tensors = Case((case.tensors[0].to(dtype), *case.tensors[1:])).leaves()
        with torch.autocast(self.device, dtype=dtype):
            actual = self.function(*tensors, **case.options)
        actual.float().square().sum().backward()
        assert actual.dtype == dtype
        assert [t.grad.dtype for t in tensors] == [t.dtype for t in tensors]
        assert_close(actual.cpu(), formula(*(t.cpu().double() for t in tensors), **case.options), dtype)


BOTH_LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@by_dtype
@BOTH_LAYOUTS
@pytest.mark.parametrize("channels", [5, 33])
def test_steps(dtype: torch.dtype, layout: str, channels: int) -> None:
    """The ops of a norm that is synchronised in between, against the definition and its derivative."""
    sizes, eps = [3, 5], 1e-3
    x = LAYOUTS[layout](2 * images(8, channels, 31) + 1).to(dtype)
    grad = LAYOUTS[layout](images(8, 31, channels).mT).to(dtype)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, var, products, sums = images(6, 2, channels).to(accumulated).abs().add(0.5)
    ops = torch.ops.paper_layers
    exact, exact_grad = x.double(), grad.double()

    def rows(values: Tensor) -> Tensor:
        return torch.cat([v.expand(n, -1) for v, n in zip(values.double(), sizes, strict=True)])[..., None]

    found = ops.split_batch_norm_statistics(x, sizes)
    for values, want in zip(found, zip(*map(moments, exact.split(sizes)), strict=True), strict=True):
        assert values.dtype == accumulated
        assert_close(values, torch.stack(want), accumulated)

    output = ops.split_batch_norm_normalize(x, weight, bias, mean, var, sizes, eps)
    normalized = (exact - rows(mean)) / rows(var + eps).sqrt()
    assert output.stride() == x.stride()
    assert_close(output, normalized * rows(weight) + rows(bias), dtype)

    found = ops.split_batch_norm_backward_sums(grad, x, mean, var, sizes, eps)
    for values, of in zip(found, (exact_grad * normalized, exact_grad), strict=True):
        assert values.dtype == accumulated
        assert_close(values, torch.stack([part.sum((0, 2)) for part in of.split(sizes)]), accumulated, scale=100)

    found = ops.split_batch_norm_backward_input(grad, x, weight, mean, var, products, sums, sizes, eps)
    want = rows(weight) / rows(var + eps).sqrt() * (exact_grad - normalized * rows(products) - rows(sums))
    assert found.stride() == x.stride()
    assert_close(found, want, dtype, scale=10)


@BOTH_LAYOUTS
@pytest.mark.parametrize("shape", [(6, 3, 30, 20), (6, 20, 30, 20), (300, 20, 1, 1), (6, 2, 90, 60)])
def test_large_offset(shape: tuple[int, ...], layout: str) -> None:
    """Means of 1e4 and variances of 1 in float32, where a sum of squares would leave no digit."""
    x = LAYOUTS[layout](images(*shape) + 1e4).requires_grad_()
    exact, sizes = x.detach().double().requires_grad_(), [shape[0] // 3, shape[0] - shape[0] // 3]
    mean, var = torch.zeros(2, shape[1]), torch.zeros(2, shape[1])
    output, want = (
        split_batch_norm(x, sizes, running_mean=mean, running_var=var, momentum=1.0),
        formula(exact, split_sizes=sizes),
    )
    torch.testing.assert_close(output.double(), want, rtol=1e-5, atol=1e-5)
    for i, part in enumerate(exact.detach().split(sizes)):
        torch.testing.assert_close(mean[i].double(), moments(part)[0], rtol=1e-7, atol=0)
        torch.testing.assert_close(var[i].double(), part.var((0, 2, 3)), rtol=1e-5, atol=0)
    grad = images(*reversed(shape)).view(shape)
    grads = [torch.autograd.grad(y, z, grad.to(y.dtype))[0] for y, z in ((output, x), (want, exact))]
    # The mean that backward is given is rounded to 1e-3, as that of torch's norms is.
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-3, atol=1e-3)


@BOTH_LAYOUTS
def test_constant_channels(layout: str) -> None:
    """Without variance the output is the bias, exactly, and gradients are finite."""
    x = LAYOUTS[layout](torch.full((4, 20, 9, 7), 0.3)).requires_grad_()
    bias = images(2, 20)
    output = split_batch_norm(x, [1, 3], bias=bias)
    torch.testing.assert_close(output[0], bias[0].view(20, 1, 1).expand(20, 9, 7), rtol=0, atol=0)
    torch.testing.assert_close(output[3], bias[1].view(20, 1, 1).expand(20, 9, 7), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(output, x, images(4, 20, 9, 7))
    assert grad.isfinite().all()


@by_dtype
@BOTH_LAYOUTS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_stays_in_its_channel_and_split(dtype: torch.dtype, layout: str, value: float) -> None:
    x = LAYOUTS[layout](images(6, 20, 9, 7)).to(dtype)
    expected = split_batch_norm(x, [2, 2, 2])
    x[3, 17, 4, 4] = value
    output = split_batch_norm(x, [2, 2, 2])
    assert output[2:4, 17].isnan().all()
    output[2:4, 17] = expected[2:4, 17]
    assert torch.equal(output, expected)


def test_running_statistics() -> None:
    """Each split's own, by momentum, unbiased; as one tensor or one a split, in other dtypes as well."""
    x = images(7, 3, 5).double()
    means, variances = images(2, 3).double(), images(2, 3).double().abs()
    want = []
    for i, part in enumerate(x.split([3, 4])):
        new = part.mean((0, 2)), part.transpose(0, 1).flatten(1).var(1)
        want.append([0.7 * old[i] + 0.3 * now for old, now in zip((means, variances), new, strict=True)])
    rows = [list(t.clone().unbind()) for t in (means, variances)]
    halves = [list(t.clone().float().unbind()) for t in (means, variances)]
    for running in ((means, variances), rows, halves):
        split_batch_norm(x, [3, 4], running_mean=running[0], running_var=running[1], momentum=0.3)
        for i, expected in enumerate(want):
            for got, value in zip(running, expected, strict=True):
                torch.testing.assert_close(got[i], value.to(got[i].dtype))


def test_parameters_one_a_split() -> None:
    """Sequences of parameters, each with a gradient of its own."""
    x, weights, biases = images(5, 3, 4), images(2, 3), images(2, 3) + 1
    lists = [[p.clone().requires_grad_() for p in stacked] for stacked in (weights, biases)]
    stacked = [p.clone().requires_grad_() for p in (weights, biases)]
    for parameters in (lists, stacked):
        output = split_batch_norm(x, [2, 3], weight=parameters[0], bias=parameters[1])
        torch.testing.assert_close(output, formula(x, weights, biases, split_sizes=[2, 3]))
        output.square().sum().backward()
    for parameters, together in zip(lists, stacked, strict=True):
        torch.testing.assert_close(torch.stack([p.grad for p in parameters]), together.grad)


def test_parameters_of_different_kinds() -> None:
    """Weights without biases and biases without weights, under vmap; of the input's dtype and of another one."""
    x, rows = images(3, 5, 3, 4), images(3, 2, 3)
    for name in ("weight", "bias"):

        def grads(x: Tensor, rows: Tensor, name: str = name) -> Any:
            def loss(x: Tensor, *parameters: Tensor) -> Tensor:
                options: dict[str, Any] = {name: parameters}
                return split_batch_norm(x, [2, 3], **options).square().sum()

            return torch.func.grad(loss, (0, 1, 2))(x, *rows)

        mapped = torch.func.vmap(grads)(x, rows)
        for i in range(3):
            torch.testing.assert_close([g[i] for g in mapped], [*grads(x[i], rows[i])])
    weight = [images(3).requires_grad_(), images(3).bfloat16().requires_grad_()]
    split_batch_norm(images(5, 3, 4).bfloat16(), [2, 3], weight=weight).square().sum().backward()
    assert [p.grad is not None and p.grad.dtype == p.dtype for p in weight] == [True, True]
    mean, var = images(2, 2, 3)
    half = images(5, 3, 4).bfloat16()
    arguments = (half, half, [p.detach() for p in weight], mean, var, 2, [2, 3], 1e-5)
    torch.library.opcheck(OPS["split_batch_norm_backward"], arguments, test_utils=("test_schema", "test_faketensor"))


def test_writes_between_forward_and_backward() -> None:
    """A bias may change, as with torch's norm; statistics count their versions, which graphs that saved them check."""
    x, bias, running = images(5, 3, 4).requires_grad_(), images(2, 3).requires_grad_(), torch.ones(2, 2, 3)
    output = split_batch_norm(x, [2, 3], bias=bias, running_mean=running[0], running_var=running[1])
    assert running._version == 4
    with torch.no_grad():
        bias.zero_()
    output.sum().backward()
    assert bias.grad is not None


@pytest.mark.parametrize("rank", [4, 5])
def test_output_may_be_changed_in_place(rank: int) -> None:
    """As an activation after the norm does, in each layout, which the output and the gradient keep."""
    for layout in ("contiguous", "channels_last"):
        for channels in (3, 20):
            x = LAYOUTS[layout](images(4, channels, *[5, 2, 3][: rank - 2])).requires_grad_()
            output = F.relu_(split_batch_norm(x, [2, 2]))
            (grad,) = torch.autograd.grad(output.square().sum(), x)
            assert output.stride() == grad.stride() == x.stride()


@pytest.mark.cpu_only
def test_same_for_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            for layout in ("contiguous", "channels_last"):
                x = LAYOUTS[layout](images(9, 40, 31, 17)).requires_grad_()
                output = split_batch_norm(x, [4, 5])
                results.append((output, *torch.autograd.grad(output.square().sum(), x)))
    finally:
        torch.set_num_threads(before)
    for i in range(2, 6):
        for got, want in zip(results[i], results[i % 2], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 3, 8), (4, 0, 8), (4, 3, 0), (4, 20, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    """Nothing comes of no values, and their moments are 0, in the kernels as in their reference."""
    ops, x, sizes = torch.ops.paper_layers, torch.zeros(shape), [shape[0] // 4, shape[0] - shape[0] // 4]
    output, mean, var = found = ops.split_batch_norm(x, [], [], sizes, 1e-5)
    arguments = (x, x, [torch.ones_like(mean)], mean, var, 1, sizes, 1e-5)
    grads = ops.split_batch_norm_backward(*arguments)
    assert output.shape == grads[0].shape == shape
    assert mean.shape == var.shape == grads[1][0].shape == grads[2][0].shape == (2, shape[1])
    assert not grads[2][0].any()
    torch.testing.assert_close(found, module._reference(x, [], [], sizes, 1e-5), rtol=0, atol=0)
    torch.testing.assert_close(grads, module._backward_reference(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("space", [(), (3, 5)])
def test_empty_part(space: tuple[int, ...], layout: str) -> None:
    """It moves no statistics, and the others are as without it; torch's batch norm takes an empty batch as well."""
    x = LAYOUTS[layout](images(6, 20, *space)).double().requires_grad_()
    running = torch.full((2, 3, 20), 7.0, dtype=torch.float64)
    weight, bias = images(3, 20).double().requires_grad_(), images(3, 20).double().requires_grad_()
    options = {"running_mean": running[0], "running_var": running[1], "weight": weight, "bias": bias}
    output = split_batch_norm(x, [2, 0, 4], **options)
    assert (running[:, 1] == 7).all()
    assert (running[:, ::2] != 7).all()
    kept = (weight[::2], bias[::2])
    torch.testing.assert_close(output, formula(x, *kept, split_sizes=[2, 4]))
    leaves = (x, weight, bias)
    grads = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
    wanted = torch.autograd.grad(formula(x, *kept, split_sizes=[2, 4]).sin().sum(), leaves, create_graph=True)
    torch.testing.assert_close(grads, wanted)
    second, expected = (torch.autograd.grad(g[0].square().sum(), leaves[:2]) for g in (grads, wanted))
    torch.testing.assert_close(second, expected)

    nothing = split_batch_norm(x[:0], [0, 0, 0], **options)
    assert nothing.shape == F.batch_norm(x[:0], running[0, 1], running[1, 1], training=True).shape == x[:0].shape
    assert (running[:, 1] == 7).all()


@pytest.mark.parametrize("shape", [(4096, 64), (256, 1000), (16, 32, 12, 12), (1000, 7)])
def test_variance_is_as_exact_as_that_of_torch(shape: tuple[int, ...]) -> None:
    """Where channels lie side by side; with a first value that is far from all others as well."""
    for first in (1, 300):
        x = images(*shape)
        x[0] *= first
        x = channels_last(x)
        flat = x.flatten(2) if x.dim() > 2 else x[..., None]
        got = torch.ops.paper_layers.split_batch_norm_statistics(flat, [len(x)])[1][0].double()
        want = flat.double().var((0, 2), correction=0)
        invstd = torch.native_batch_norm(x, None, None, None, None, True, 0.1, 0)[2].double()
        error, of_torch = ((value - want).abs().max() / want.max() for value in (got, 1 / invstd.square()))
        assert error <= max(of_torch, 6e-7)
        assert ((got - want).abs() / want).max() < 2e-6


ARGUMENTS: list[Any] = [images(4, 3, 5), images(4, 3, 5), [], images(2, 3), images(2, 3), 1, [1, 3], 1e-5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: images(4, 3, 4)}, "grad: expected shape"),
        ({0: images(4, 3, 5).double()}, "grad: expected the dtype"),
        ({0: images(4), 1: images(4)}, "input: expected shape"),
        ({2: [images(3)]}, "weight: expected 2 of them, got 1"),
        ({2: [images(3), images(2)]}, "weight: expected shape"),
        ({2: [images(3, 2)]}, "weight: expected shape"),
        ({2: [images(3), images(3).long()]}, "weight: expected Float"),
        ({5: 3}, "biases: expected"),
        ({2: [images(2, 3)], 5: 2}, "biases: expected"),
        ({3: images(1, 3)}, "mean: expected"),
        ({4: images(2, 3).double()}, "var: expected"),
        ({6: [1, 2]}, "split_sizes: expected sizes that sum to 4"),
        ({6: [5, -1]}, "split_sizes: expected sizes that sum to 4"),
        ({6: [2**63 - 1, 4]}, "split_sizes: expected sizes that sum to 4"),
    ],
)
def test_kernels_check_again(change: dict[int, Any], message: str) -> None:
    """The ops themselves, called past the public function, refuse what would be read out of bounds."""
    arguments = [change.get(i, value) for i, value in enumerate(ARGUMENTS)]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.paper_layers.split_batch_norm_backward(*arguments)
    if not {0, 3, 4, 5} & change.keys():
        with pytest.raises(RuntimeError, match=message):
            torch.ops.paper_layers.split_batch_norm(arguments[1], arguments[2], [], *arguments[6:])


@pytest.mark.slow_emulated
@pytest.mark.parametrize("shape", [(6, 507, 65, 19), (254, 579, 19, 1), (5, 31, 203, 80)])
def test_large_images_of_odd_channels(shape: tuple[int, ...]) -> None:
    """Results past the caches are written in whole vectors, which rows of these do not start at."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    sizes = [shape[0] // 3, shape[0] - shape[0] // 3]
    output = split_batch_norm(x, sizes)
    # In float32 torch's own channels_last norm loses digits.
    expected = torch.cat([F.batch_norm(part.double(), None, None, training=True) for part in x.split(sizes)])
    torch.testing.assert_close(output, expected.float())
    grad = output.detach().cos()
    grads = [torch.autograd.grad(y, x, grad.to(y.dtype))[0] for y in (output, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
