"""The helper behind the gradients of all ops, on a product of two tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paper_layers._core.differentiable import differentiable
from paper_layers._core.vmap import folded

calls: list[str] = []


def note(name: str) -> None:
    if not torch.compiler.is_compiling():
        calls.append(name)


def forward(a: Tensor, b: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    note("forward")
    return factor * a * b, (a > b).long()


def backward(grad: Tensor, a: Tensor, b: Tensor, product: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    note("backward")
    return product / a * grad, product / b * grad


def formula(grad: Tensor, a: Tensor, b: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return factor * b * grad, factor * a * grad


scaled = differentiable(
    "test_scaled", forward, backward, formula=formula, vmap=folded(), outputs=2, exposed=(0,), constant=(1,)
)


def pair(**options: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(2, 3, dtype=torch.float64, **options) + 1, torch.rand(2, 3, dtype=torch.float64, **options) + 1


def product(a: Tensor, b: Tensor) -> Tensor:
    return scaled(a, b, (3.0,))[0]


def test_gradients_to_second_order() -> None:
    leaves = tuple(t.requires_grad_() for t in pair())
    assert torch.autograd.gradcheck(product, leaves)
    assert torch.autograd.gradgradcheck(product, leaves)
    index = scaled(*leaves, (3.0,))[1]
    assert not index.requires_grad


@pytest.mark.parametrize("gradients", [False, True])
def test_no_function_of_autograd_where_nothing_needs_a_gradient(gradients: bool) -> None:
    a, b = pair()
    output = product(a.requires_grad_(gradients), b)
    assert (output.grad_fn is not None) == gradients
    with torch.no_grad():
        assert product(a, b).grad_fn is None


def test_outputs_may_be_written_to() -> None:
    a, b = (t.requires_grad_() for t in pair())
    calls.clear()
    torch.autograd.grad(product(a, b).sum(), a)
    assert calls == ["forward", "backward"]
    output = product(a, b)
    output.mul_(0)
    (grad,) = torch.autograd.grad(output.sum() + product(a, b).sum(), a)
    torch.testing.assert_close(grad, 3 * b.detach())
    assert calls.count("forward") == 4  # Again for the output that was overwritten.


def test_transforms_and_compile() -> None:
    a, b = pair()
    want = torch.autograd.functional.jacobian(lambda a: 3 * a * b, a).sum((0, 1))
    for function in (
        torch.func.grad(lambda a, b: product(a, b).sum()),
        torch.func.vmap(torch.func.grad(lambda a, b: product(a[None], b[None]).sum())),
    ):
        torch.testing.assert_close(function(a, b), want)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda a: product(a, b), (a,), (b,))
    leaf = a.clone().requires_grad_()
    compiled = torch.compile(lambda a: product(a, a).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], 6 * a)
