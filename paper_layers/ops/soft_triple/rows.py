"""The loss from each row's log-sum-exp and target: the last step of SoftTriple, as one op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers._core.differentiable import differentiable
from paper_layers._core.library import define
from paper_layers._core.vmap import one_by_one

REDUCTIONS = ("mean", "sum", "none")


def _reference(
    others: Tensor,
    target: Tensor,
    distance: Tensor,
    weights: Tensor | None,
    labels: Tensor,
    regulariser: float,
    reduction: str,
) -> Tensor:
    # Up to 80 the logarithm is taken: float64 sees the difference.
    losses = F.softplus(others - target, threshold=80)
    if weights is not None:
        losses = losses * weights
    counted, extra = labels >= 0, regulariser * distance
    each, number = torch.where(counted, losses, 0), counted.sum()
    if reduction == "none":
        return each + extra * counted
    if reduction == "sum":
        return each.sum() + extra * (number > 0)
    return (each.sum() + extra * number) / number.clamp(min=1)


def _fake(others: Tensor, *arguments: Any) -> Tensor:
    return others.new_empty(others.shape if arguments[-1] == "none" else ())


def _backward_reference(
    grad: Tensor, others: Tensor, target: Tensor, distance: Tensor, weights: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    def loss(others: Tensor, target: Tensor, distance: Tensor, weights: Tensor | None = None) -> Tensor:
        return _reference(others, target, distance, weights, *options)

    given = (others, target, distance) if weights is None else (others, target, distance, weights)
    gradients: tuple[Tensor, ...] = torch.func.vjp(loss, *given)[1](grad)
    return gradients if weights is not None else (*gradients, others.new_empty(0))


def _backward_fake(grad: Tensor, others: Tensor, target: Tensor, distance: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    of_weights = 0 if rest[0] is None else others.shape
    return (*(others.new_empty(shape) for shape in (others.shape, others.shape, (), of_weights)),)


_ARGUMENTS = (
    "Tensor others, Tensor target, Tensor distance, Tensor? weights, Tensor labels, float regulariser, str reduction"
)
# Torch's functions round an element by its place in a vector; a row's loss must not depend on the place.
_forward_op = define(f"soft_triple_reduce({_ARGUMENTS}) -> Tensor", _reference, _fake)
_backward_op = define(
    f"soft_triple_reduce_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
)
_reduced = differentiable("soft_triple_reduce", _forward_op, _backward_op, formula=_backward_reference, vmap=one_by_one)


def reduce_rows(
    others: Tensor,
    target: Tensor,
    distance: Tensor,
    labels: Tensor,
    *,
    regulariser: float,
    reduction: str,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Return the loss from the parts that `soft_triple` returns.

    A row's loss is its cross-entropy, :math:`\log (1 + e^{o - t})` from its other classes' log-sum-exp o and its
    target t, times its weight. Rows whose label is negative do not count.

    Args:
        others: Shape (B,).
        target: Shape (B,).
        distance: Shape ().
        labels: int64 of shape (B,).
        regulariser: Factor of `distance`.
        reduction: "mean", "sum" or "none", as in `soft_triple_loss`.
        weights: Shape (B,), or None.

    Example:
        >>> import torch
        >>> from paper_layers.ops.soft_triple.loss import soft_triple
        >>> labels = torch.arange(8)
        >>> parts = soft_triple(torch.randn(8, 64), torch.randn(100, 10, 64), labels)
        >>> loss = reduce_rows(*parts, labels, regulariser=0.001, reduction="mean")
    """
    if weights is not None and weights.dtype != others.dtype:
        dtype = torch.promote_types(weights.dtype, others.dtype)
        others, target, distance, weights = (t.to(dtype) for t in (others, target, distance, weights))
    loss: Tensor = _reduced(others, target, distance, weights, labels, (float(regulariser), reduction))
    return loss
