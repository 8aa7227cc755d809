"""A linear layer divided by its weight's spectral norm: the ops and the function that layers call."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers._core import checks, dtypes
from paper_layers._core.autocast import autocasts, without_autocast
from paper_layers._core.differentiable import differentiable
from paper_layers._core.library import define
from paper_layers._core.vmap import one_by_one

_SHORTEST = 1e-12  # As in torch's spectral norm.


def _iterate(weight: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left = F.normalize(weight @ v, dim=0, eps=_SHORTEST)
    right = weight.mT @ left
    sigma = torch.linalg.vector_norm(right, dtype=dtypes.accumulation(right))
    return left, right / sigma.clamp(min=_SHORTEST), sigma


def _iterate_fake(weight: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    return weight.new_empty(rows), weight.new_empty(columns), weight.new_empty((), dtype=dtypes.accumulation(weight))


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor) -> Tensor:
    return F.linear(input / sigma, weight, bias)


def _forward_fake(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[0])


def _backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    sigma: Tensor,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scaled = grad / sigma
    grad_input, grad_weight, grad_bias = (grad.new_empty(0) for _ in range(3))
    if needs_input:
        grad_input = scaled @ weight
    if needs_weight:
        grad_weight = scaled.mT @ input
        # The gradient of sigma, from whichever product exists.
        along = -(_dot(grad_input, input) if needs_input else _dot(grad_weight, weight)) / sigma
        grad_weight = grad_weight.addr((left * along).to(weight.dtype), right.to(weight.dtype))
    if needs_bias:
        grad_bias = grad.sum(0)
    return grad_input, grad_weight, grad_bias


def _backward_fake(grad: Tensor, input: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    needs = zip((input.shape, weight.shape, weight.shape[:1]), others[-3:], strict=True)
    return tuple(grad.new_empty(shape if needed else (0,)) for shape, needed in needs)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of products, in float32 for half types, which could overflow under a loss scale."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return (a * b).sum(dtype=torch.float32)
    return a.flatten().dot(b.flatten())


# left = W v and right = W^T left, both normalized, and the length of right, sigma.
power_iteration = define(
    "power_iteration(Tensor weight, Tensor v) -> (Tensor, Tensor, Tensor)", _iterate, _iterate_fake
)
linear_forward = define(
    "spectral_linear(Tensor input, Tensor weight, Tensor? bias, Tensor sigma) -> Tensor",
    _forward,
    _forward_fake,
    decompose=True,
    flops=lambda input, weight, *_: 2 * input[0] * math.prod(weight),
)
# Gradients of input, weight and bias; empty tensors for those that are not needed.
linear_backward = define(
    "spectral_linear_backward(Tensor grad, Tensor input, Tensor weight, Tensor left, Tensor right, Tensor sigma, "
    "bool needs_input, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    flops=lambda grad, input, weight, *others: 2 * input[0] * math.prod(weight) * sum(others[-3:-1]),
)


def _divided(input: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, sigma: Tensor) -> Tensor:
    return linear_forward(input, weight, bias, sigma)


def _gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, needs = arguments
    return linear_backward(*tensors, *needs[:3])


def _formula(
    grad: Tensor, input: Tensor, weight: Tensor, left: Tensor, right: Tensor, sigma: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    sigma = left.dot(weight.to(left.dtype) @ right)  # For the second derivative it is a function of the weight.
    return _backward(grad, input, weight, left, right, sigma, *needs[:3])


_spectral_linear = differentiable(
    "spectral_linear",
    _divided,
    _gradients,
    formula=_formula,
    vmap=one_by_one,
    saved=(0, 1, 3, 4, 5),
    selective=True,
)


def spectral_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, u: Tensor, v: Tensor, training: bool = False
) -> Tensor:
    r"""Apply a linear layer whose weight is divided by its spectral norm.

    .. math:: y = x W^T / \sigma + b, \quad \sigma = u^T W v

    Miyato, Kataoka, Koyama, Yoshida, "Spectral Normalization for Generative Adversarial Networks", ICLR 2018, algorithm
    1. The product is divided, not the weight, and the gradient of :math:`\sigma` is one update of rank 1.

    Args:
        input: Shape (..., N).
        weight: Shape (M, N).
        bias: Shape (M,).
        u: The left singular vector, of shape (M,).
        v: The right one, of shape (N,).
        training: If True, u and v first take one step of the power iteration.

    Returns:
        Shape (..., M); under autocast in its dtype.

    Raises:
        TypeError: The input is not a tensor of float32, float64, bfloat16 or float16.
        ValueError: Sizes do not fit the weight's.

    Example:
        >>> import torch
        >>> from paper_layers.ops import spectral_linear
        >>> weight, u, v = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.ones(2), torch.tensor([1.0, 0.0])
        >>> spectral_linear(torch.tensor([6.0, 6.0]), weight, u=u, v=v, training=True)
        tensor([6., 4.])
    """
    checks.floating("input", input)
    checks.shape("weight", weight, ("M", "N"))
    rows, columns = weight.shape
    if input.dim() == 0 or input.shape[-1] != columns:
        raise ValueError(f"input: expected shape (..., {columns}), got {tuple(input.shape)}")
    for name, value, size in (("bias", bias, rows), ("u", u, rows), ("v", v, columns)):
        if value is not None:
            checks.shape(name, value, (size,))
    kind = input.device.type
    with torch.no_grad(), without_autocast(kind):
        if training:
            left, right, sigma = power_iteration(weight, v)
            u.copy_(left)
            v.copy_(right)
        else:
            left, right = u.clone(), v.clone()
            sigma = left.dot(weight @ right)
    if autocasts(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if input.dim() == 2:
        return _spectral_linear(input, weight, bias, left, right, sigma, ())
    output = _spectral_linear(input.reshape(-1, input.shape[-1]), weight, bias, left, right, sigma, ())
    return output.reshape(*input.shape[:-1], rows)
