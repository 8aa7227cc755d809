"""Linear layers on two inputs side by side, without the concatenation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core.autocast import autocasts
from paper_layers._core.differentiable import differentiable
from paper_layers._core.vmap import one_by_one


def _terms(x: Tensor, own: Tensor, difference: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    weight = own - difference
    return F.linear(x, weight, bias), F.linear(x, difference), weight


def _gradients(
    grad_center: Tensor, grad_neighbor: Tensor, x: Tensor, own: Tensor, difference: Tensor, bias: Any, *others: Any
) -> tuple[Tensor, ...]:
    weight, needs = others
    grad_x = torch.addmm(grad_center.mm(weight), grad_neighbor, difference) if needs[0] else x.new_empty(0)
    grad_own = grad_center.t().mm(x)
    grad_difference = torch.addmm(grad_own, grad_neighbor.t(), x, beta=-1)
    return grad_x, grad_own, grad_difference, grad_center.sum(0) if needs[3] else x.new_empty(0)


def _formula(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, _, needs = arguments
    return _gradients(*tensors, tensors[3] - tensors[4], needs)


_edge_linear = differentiable(
    "edge_linear",
    _terms,
    _gradients,
    formula=_formula,
    vmap=one_by_one,
    outputs=3,
    kept=(2,),
    constant=(2,),
    selective=True,
)


def edge_linear(x: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Split a linear layer on [x_i, x_j - x_i] into a term of i and a term of j, for rows x of shape (N, C).

    One Function takes half as many steps as autograd: its matrix products add up gradients.
    """
    own, difference = linear.weight.chunk(2, 1)
    if autocasts(x.device.type):
        return F.linear(x, own - difference, linear.bias), F.linear(x, difference)
    center, neighbor, _ = _edge_linear(x, own, difference, linear.bias, ())
    return center, neighbor


def _sum(x: Tensor, other: Tensor, own: Tensor, rest: Tensor, bias: Tensor | None) -> Tensor:
    return torch.addmm(F.linear(x, own, bias), other, rest.t())


def _sum_gradients(
    grad: Tensor, x: Tensor, other: Tensor, own: Tensor, rest: Tensor, bias: Any, needs: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    none, turned = x.new_empty(0), grad.t()
    return (
        grad.mm(own) if needs[0] else none,
        grad.mm(rest) if needs[1] else none,
        turned.mm(x),
        turned.mm(other),
        grad.sum(0) if needs[4] else none,
    )


_pair_linear = differentiable(
    "pair_linear", _sum, _sum_gradients, formula=_sum_gradients, vmap=one_by_one, selective=True
)


def pair_linear(x: Tensor, other: Tensor, linear: nn.Linear) -> Tensor:
    """Apply a linear layer to the concatenation of rows x and other rows, both of shape (N, C)."""
    own, rest = linear.weight.split([x.shape[1], other.shape[1]], 1)
    if autocasts(x.device.type):
        return F.linear(x, own, linear.bias) + F.linear(other, rest)
    result: Tensor = _pair_linear(x, other, own, rest, linear.bias, ())
    return result
