from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paper_layers.ops.spectral_linear import linear_backward, linear_forward, power_iteration, spectral_linear
from testing.battery import OpBattery
from testing.cases import Case, assert_close, by_dtype, drawn

pytestmark = pytest.mark.cpu_only


def vector(size: int, like: Tensor) -> Tensor:
    """A vector of length one, or nearly so in half types."""
    values = torch.arange(1.0, size + 1, dtype=torch.float64, device=like.device).mul(1.7).cos()
    return (values / values.norm()).to(like.dtype)


def function(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    u, v = (vector(size, weight) for size in weight.shape)
    return spectral_linear(input, weight, bias, u=u, v=v, training=False)


def formula(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    u, v = (vector(size, weight) for size in weight.shape)
    return input @ (weight / (u @ weight @ v)).mT + bias


def near_its_sigma(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A weight with u^T W v = 2, and a part in all other directions."""
    noise = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    u, v = vector(rows, noise), vector(columns, noise)
    return (noise / (rows + columns) ** 0.5 + (2 - u @ noise @ v / (rows + columns) ** 0.5) * u.outer(v)).float()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / shape[-1] ** 0.5


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = st.sampled_from([1, 2, 3, 7, 8, 16, 17, 33, 64, 100, 130])
    rows, columns, seed = draw(sizes), draw(sizes), draw(st.integers(0, 2**20))
    batch = draw(st.sampled_from([(0,), (1,), (5,), (33,), (2, 3), ()]))
    input, weight = numbers(*batch, columns, seed=seed), near_its_sigma(rows, columns, seed)
    layout = draw(st.sampled_from(["contiguous", "transposed", "expanded"]))
    if layout == "transposed":
        weight, input = weight.mT.contiguous().mT, torch.stack([input, input], -1)[..., 0]
    elif layout == "expanded":
        input = input[..., :1].expand(input.shape)
    return Case((input, weight, numbers(rows, seed=seed)))


def call(**change: Any) -> Any:
    arguments = {"input": numbers(5, 4), "weight": numbers(3, 4), "sigma": torch.tensor(2.0), "bias": None, **change}
    return lambda: linear_forward(*(arguments[name] for name in ("input", "weight", "bias", "sigma")))


class TestSpectralLinear(OpBattery):
    function = staticmethod(function)
    formula = staticmethod(formula)
    grad_scale = 20.0  # Sums over up to 33 rows and 130 columns.
    ops = {  # noqa: RUF012
        "power_iteration": power_iteration,
        "spectral_linear": linear_forward,
        "spectral_linear_backward": linear_backward,
    }
    # Sizes reach memory through the kernels' own checks.
    bad_inputs = {  # noqa: RUF012
        "no rows": (
            lambda: function(torch.tensor(1.0), numbers(3, 4), numbers(3)),
            ValueError,
            r"input: .*\(\.\.\., 4\)",
        ),
        "size": (lambda: function(numbers(5, 3), numbers(3, 4), numbers(3)), ValueError, r"input: .*4\), got \(5, 3\)"),
        "integers": (
            lambda: function(numbers(5, 4).long(), numbers(3, 4), numbers(3)),
            TypeError,
            "input: expected one of .*, got torch.int64",
        ),
        "bias": (
            lambda: function(numbers(5, 4), numbers(3, 4), numbers(1)),
            ValueError,
            r"bias: expected shape \(3,\), got \(1,\)",
        ),
        "weight's rank": (
            lambda: spectral_linear(numbers(5, 4), numbers(4), u=numbers(3), v=numbers(4), training=True),
            ValueError,
            r"weight: expected shape \(M, N\), got \(4,\)",
        ),
        "u": (
            lambda: spectral_linear(numbers(5, 4), numbers(3, 4), u=numbers(4), v=numbers(4), training=True),
            ValueError,
            r"u: expected shape \(3,\), got \(4,\)",
        ),
        "v's size": (
            lambda: spectral_linear(numbers(5, 4), numbers(3, 4), u=numbers(3), v=numbers(3), training=True),
            ValueError,
            r"v: expected shape \(4,\), got \(3,\)",
        ),
        "op: input": (call(input=numbers(5, 3)), RuntimeError, r"input: expected shape \(5, 4\)"),
        "op: rank": (call(input=numbers(4)), RuntimeError, r"input: expected shape \(M, N\), got \(4\)"),
        "op: bias": (call(bias=numbers(4)), RuntimeError, r"bias: expected shape \(3\), got \(4\)"),
        "op: dtype": (call(bias=numbers(3).double()), RuntimeError, "bias: expected the dtype of weight"),
        "op: sigma": (call(sigma=torch.ones(1)), RuntimeError, r"sigma: expected shape \(\), got \(1\)"),
        "v": (lambda: power_iteration(numbers(3, 4), numbers(3)), RuntimeError, r"v: expected shape \(4\), got \(3\)"),
        "weight": (lambda: power_iteration(numbers(3), numbers(3)), RuntimeError, r"weight: expected shape \(M, N\)"),
        "grad": (
            lambda: linear_backward(*backward_arguments(grad=numbers(5, 4)), True, True, True),
            RuntimeError,
            r"grad: expected shape \(5, 3\), got \(5, 4\)",
        ),
        "left": (
            lambda: linear_backward(*backward_arguments(left=numbers(4)), True, True, True),
            RuntimeError,
            r"left: expected shape \(3\), got \(4\)",
        ),
        "right": (
            lambda: linear_backward(*backward_arguments(right=numbers(3)), True, True, True),
            RuntimeError,
            r"right: expected shape \(4\), got \(3\)",
        ),
    }

    @staticmethod
    def cases() -> st.SearchStrategy[Case]:
        return cases()

    @staticmethod
    def fixed_cases() -> list[Case]:
        return [
            Case((numbers(5, 4), near_its_sigma(3, 4), numbers(3))),
            Case((numbers(6, 20), near_its_sigma(9, 20), numbers(9))),
        ]

    def maps(self, case: Case) -> list[Callable[..., Any]]:
        return super().maps(case)[:1]

    @staticmethod
    def op_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
        input, weight, bias = case.tensors
        left, right = (vector(size, weight) for size in weight.shape)
        sigma, grad = torch.tensor(2.0), numbers(input.shape[0], weight.shape[0])
        return {
            "power_iteration": (weight, right),
            "spectral_linear": (input, weight, bias, sigma),
            "spectral_linear_backward": (grad, input, weight, left, right, sigma, True, True, True),
        }

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype: torch.dtype) -> None:
        """As torch's linear layer: in the dtype of autocast, gradients in each tensor's own."""
        case = self.fixed_cases()[1]
        leaves = case.leaves()
        with torch.autocast("cpu", dtype=dtype):
            actual = function(*leaves)
        assert actual.dtype == dtype
        actual.float().sum().backward()
        exact = case.to(torch.float64).leaves()
        formula(*exact).sum().backward()
        for got, want in zip(leaves, exact, strict=True):
            assert got.grad.dtype == torch.float32
            assert_close(got.grad, want.grad, dtype, scale=self.grad_scale)


def backward_arguments(**change: Tensor) -> tuple[Tensor, ...]:
    arguments = {"grad": numbers(5, 3), "input": numbers(5, 4), "weight": numbers(3, 4)}
    arguments |= {"left": numbers(3), "right": numbers(4), "sigma": torch.tensor(2.0), **change}
    return tuple(arguments.values())


@by_dtype
def test_power_iteration_equals_formula(dtype: torch.dtype) -> None:
    @drawn
    @given(case=cases())
    def check(case: Case) -> None:
        weight = case.tensors[1].to(dtype)
        v = vector(weight.shape[1], weight)
        left = weight.double() @ v.double()
        left = left / left.norm()
        right = left @ weight.double()
        got = power_iteration(weight, v)
        assert [t.dtype for t in got] == [dtype, dtype, torch.promote_types(dtype, torch.float32)]
        assert_close(got[0], left, dtype)
        assert_close(got[1], right / right.norm(), dtype)
        assert_close(got[2], right.norm(), torch.promote_types(dtype, torch.float32), scale=4)

    check()


def test_power_iteration_finds_the_norm() -> None:
    weight, u, v = torch.randn(40, 30, dtype=torch.float64), torch.ones(40).double(), torch.ones(30).double()
    for _ in range(2000):
        spectral_linear(torch.zeros(1, 30, dtype=torch.float64), weight, u=u, v=v, training=True)
    torch.testing.assert_close(u @ weight @ v, torch.linalg.matrix_norm(weight, 2))


def test_power_iteration_of_zero() -> None:
    """As in torch: lengths below 1e-12 count as 1e-12."""
    left, right, sigma = power_iteration(torch.zeros(3, 4), torch.ones(4))
    assert not left.any()
    assert not right.any()
    assert sigma == 0


@pytest.mark.parametrize("needs", [(i, w, b) for i in (False, True) for w in (False, True) for b in (False, True)])
def test_only_what_is_needed(needs: tuple[bool, bool, bool]) -> None:
    arguments = backward_arguments()
    every = linear_backward(*arguments, True, True, True)
    for got, want, needed in zip(linear_backward(*arguments, *needs), every, needs, strict=True):
        torch.testing.assert_close(got, want if needed else torch.empty(0))


def test_results_do_not_depend_on_threads() -> None:
    weight, grad = numbers(300, 200), numbers(70, 300)
    input, left, right, sigma = numbers(70, 200), weight[:, 0], weight[0], weight[0, 0]
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            bias = linear_backward(grad, input, weight, left, right, sigma, False, False, True)[2]
            results.append((*power_iteration(weight, vector(200, weight)), bias))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_half_types_round_the_gradient_of_the_input_first() -> None:
    """The slope of sigma is a sum over that gradient: near the largest number, the whole may or may not overflow."""
    input, weight, grad = numbers(9, 30).half(), numbers(20, 30).half(), (40 * numbers(9, 20)).half()
    left, right, sigma = vector(20, weight).float(), vector(30, weight).float(), torch.tensor(0.5)
    got = linear_backward(grad, input, weight, left, right, sigma, True, True, True)[1].double()
    x, w, g, u, v = (t.double() for t in (input, weight, grad / sigma, left, right))

    def gradient(x: Tensor, w: Tensor, g: Tensor, u: Tensor, v: Tensor, sign: float) -> Tensor:
        return g.mT @ x + sign * (g @ w * x).sum() / 0.5 * u.outer(v)

    bound = 2.0**-10 * gradient(*(t.abs() for t in (x, w, g, u, v)), 1)
    assert ((got - gradient(x, w, g, u, v, -1)).abs() <= bound).all()
