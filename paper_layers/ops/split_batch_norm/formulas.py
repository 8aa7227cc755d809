"""The formulas of split batch norm on tensors (N, C, P), which its ops compute without a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paper_layers._core import dtypes


def is_channels_last(input: Tensor) -> bool:
    """Return whether the input is channels_last and not also contiguous."""
    return not input.is_contiguous() and input.transpose(1, 2).is_contiguous()


def in_layout(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor in the memory layout of outputs for `like`."""
    return empty(like).copy_(tensor) if is_channels_last(like) else tensor.contiguous()


def empty_statistics(input: Tensor, split_sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return two uninitialized tensors (S, C) in the dtype of statistics."""
    shape, dtype = (len(split_sizes), input.shape[1]), dtypes.accumulation(input)
    return input.new_empty(shape, dtype=dtype), input.new_empty(shape, dtype=dtype)


def empty(like: Tensor) -> Tensor:
    """Return an uninitialized output. No view: torch forbids writes in place to views from a custom Function."""
    return torch.empty_like(like) if is_channels_last(like) else like.new_empty(like.shape)


def statistics(input: Tensor, split_sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each split's channels, both (S, C); 0 for a split without values."""
    parts = input.to(dtypes.accumulation(input)).split(list(split_sizes))
    empty = [part.numel() == 0 for part in parts]
    mean = [part.sum((0, 2)) if none else part.mean((0, 2)) for part, none in zip(parts, empty, strict=True)]
    var = [
        part.sum((0, 2)) if none else part.var((0, 2), correction=0) for part, none in zip(parts, empty, strict=True)
    ]
    return torch.stack(mean), torch.stack(var)


def _to_rows(values: Tensor, split_sizes: Sequence[int]) -> Tensor:
    """Repeat each split's values (S, C) for its images: (N, C, 1)."""
    rows = [value.expand(size, -1) for value, size in zip(values.unbind(), split_sizes, strict=True)]
    return torch.cat(rows)[..., None]


def normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    split_sizes: Sequence[int],
    eps: float,
) -> Tensor:
    """Normalize each split by its statistics and parameters; differentiable to any order."""
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    output = (input - _to_rows(mean, split_sizes)) * _to_rows(scale, split_sizes)
    if bias is not None:
        output = output + _to_rows(bias, split_sizes)
    return output.to(input.dtype)


def backward_sums(
    grad: Tensor, input: Tensor, mean: Tensor, var: Tensor, split_sizes: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """Return each split's sums of grad times the normalized input and of grad, both (S, C)."""
    grad = grad.to(mean.dtype)
    normalized = normalize(input.to(mean.dtype), None, None, mean, var, split_sizes, eps)
    products = torch.stack([part.sum((0, 2)) for part in (grad * normalized).split(list(split_sizes))])
    return products, torch.stack([part.sum((0, 2)) for part in grad.split(list(split_sizes))])


def backward_input(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mean_product: Tensor,
    mean_grad: Tensor,
    split_sizes: Sequence[int],
    eps: float,
) -> Tensor:
    """Return the gradient of the input from the means of `backward_sums`' two sums."""
    normalized = normalize(input.to(mean.dtype), mean_product, mean_grad, mean, var, split_sizes, eps)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    return ((grad - normalized) * _to_rows(scale, split_sizes)).to(input.dtype)
