"""Linear layers on two inputs against the same on their concatenation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from paper_layers.deep_gcn._edge_linear import edge_linear, pair_linear
from tests.ops.test_neighbor_reduce import features

Function = Callable[[Tensor, nn.Linear], Tensor]


def edges(x: Tensor, linear: nn.Linear) -> Tensor:
    center, neighbor = edge_linear(x, linear)
    return center + neighbor.flip(0)


def pairs(x: Tensor, linear: nn.Linear) -> Tensor:
    return pair_linear(x, x.flip(0).sin(), linear)


def expected_edges(x: Tensor, linear: nn.Linear) -> Tensor:
    return linear(torch.cat([x, x.flip(0) - x], 1))


def expected_pairs(x: Tensor, linear: nn.Linear) -> Tensor:
    return linear(torch.cat([x, x.flip(0).sin()], 1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("function", "expected"), [(edges, expected_edges), (pairs, expected_pairs)])
def test_equals_the_concatenation(function: Function, expected: Function, bias: bool) -> None:
    linear, x = nn.Linear(6, 4, bias, dtype=torch.float64), features(5, 3).double().requires_grad_()
    leaves = (x, *linear.parameters())
    found = []
    for each in (function, expected):
        first = torch.autograd.grad(each(x, linear).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)
        found.append((each(x, linear), *first, *second))
    torch.testing.assert_close(*found)
    stacked = torch.stack([x, 2 * x]).detach()
    per_element = torch.func.vmap(torch.func.grad(lambda t: function(t, linear).square().sum()))(stacked)
    alone = [torch.autograd.grad(expected(t.requires_grad_(), linear).square().sum(), t)[0] for t in stacked.unbind()]
    torch.testing.assert_close(per_element, torch.stack(alone))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
@pytest.mark.parametrize("function", [edges, pairs])
def test_what_needs_no_gradient_gets_none(function: Function, frozen: str) -> None:
    linear, x = nn.Linear(6, 4), features(5, 3).requires_grad_()
    leaves = {"x": x, "weight": linear.weight, "bias": linear.bias}
    leaves.pop(frozen).requires_grad_(False)
    function(x, linear).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())


@pytest.mark.parametrize("function", [edges, pairs])
def test_autocast(function: Function) -> None:
    linear, x = nn.Linear(6, 4), features(5, 3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = function(x, linear)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32
