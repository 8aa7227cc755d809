"""A linear layer whose spectral norm costs little more than its matrix product."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from paper_layers.ops._autograd import Function


class SpectralLinear(nn.Linear):
    r"""A linear layer that makes `torch.nn.utils.parametrizations.spectral_norm` cheap: same numbers, same state dict.

    .. math:: y = x W^T / \sigma + b, \quad \sigma = u^T W v

    Torch divides the weight, and differentiates the division, in ten passes over memory of the weight's size, which
    cost a third of the products for a batch of 512 and a width of 2048. Here the input is divided, and the gradient of
    :math:`\sigma` is one update of rank 1. `weight` still gives the normalized weight.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer; in training mode after a step of the power iteration."""
        if not parametrize.is_parametrized(self, "weight"):
            return super().forward(input)
        weight: Any = self.parametrizations.weight  # type: ignore[union-attr]
        return spectral_linear(input, weight.original, self.bias, weight[0]._u, weight[0]._v, self.training)


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Off on this type of device."""
    return torch.autocast(kind, enabled=False) if _autocasts(kind) else nullcontext()


def _autocasts(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)


def spectral_linear(input: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, training: bool) -> Tensor:
    """``input @ (weight / sigma).T + bias``; in training after a step of the power iteration, which updates u and v."""
    kind = input.device.type
    with torch.no_grad(), without_autocast(kind):
        if training:
            left = F.normalize(weight @ v, dim=0, eps=1e-12)
            right = weight.mT @ left
            sigma = right.norm()
            right = right / sigma.clamp(min=1e-12)
            u.copy_(left)
            v.copy_(right)
        else:
            left, right = u.clone(), v.clone()
            sigma = left.dot(weight @ right)
        inverse = sigma.reciprocal()
    if _autocasts(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _ScaledLinear.apply(input, weight, bias, left, right, inverse)


class _ScaledLinear(Function):
    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, inverse: Tensor
    ) -> Tensor:
        return F.linear(input * inverse, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        input, weight, _, left, right, inverse = inputs
        ctx.save_for_backward(input, weight, left, right, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight, left, right, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # For the second derivative sigma is a function of the weight.
            inverse = left.dot(weight.to(left.dtype) @ right).reciprocal()
        scaled = grad * inverse
        grad_input = scaled @ weight
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            along = -_dot(grad_input, input) * inverse  # The gradient of sigma.
            step = (left * along).to(weight.dtype), right.to(weight.dtype)
            grad_weight = (scaled.flatten(0, -2).mT @ input.flatten(0, -2)).addr_(*step)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_input, grad_weight, grad_bias, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products; in float32 for half types, where it would overflow under a loss scale."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return (a * b).sum(dtype=torch.float32)
    return a.flatten().dot(b.flatten())
