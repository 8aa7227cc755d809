"""The formulas of split batch norm on tensors (N, C, ...), which its ops compute without a kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from paper_layers._core import dtypes


def is_channels_last(input: Tensor) -> bool:
    """Return whether the input is channels_last and not also contiguous."""
    return not input.is_contiguous() and input.movedim(1, -1).is_contiguous()


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


def table(values: Sequence[Tensor]) -> Tensor | None:
    """Return parameters as one tensor (S, C); None for an empty list."""
    if len(values) == 1:
        return values[0] if values[0].dim() == 2 else values[0][None]
    return torch.stack(list(values)) if values else None


def dtype_of(parameters: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that the parameters of a list have in common."""
    return functools.reduce(torch.promote_types, {one.dtype for one in parameters}) if parameters else torch.float32


def untable(values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return values (S, C) in the shapes and the dtype of a list of parameters."""
    dtype = dtype_of(like)
    if len(like) == 1 and like[0].dim() == 2:
        return [values.to(dtype, copy=True)]
    return [row.to(dtype, copy=True) for row in values.unbind()] if like else []


def _values(input: Tensor) -> Tensor:
    """Return the input as (N, C, P)."""
    return input.flatten(2) if input.dim() > 2 else input[..., None]


def statistics(input: Tensor, split_sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each split's channels, both (S, C); 0 for a split without values."""
    parts = _values(input).to(dtypes.accumulation(input)).split(list(split_sizes))
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
    output = (_values(input) - _to_rows(mean, split_sizes)) * _to_rows(scale, split_sizes)
    if bias is not None:
        output = output + _to_rows(bias, split_sizes)
    return output.to(input.dtype).reshape(input.shape)


def backward_sums(
    grad: Tensor, input: Tensor, mean: Tensor, var: Tensor, split_sizes: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """Return each split's sums of grad times the normalized input and of grad, both (S, C)."""
    grad = _values(grad).to(mean.dtype)
    normalized = normalize(_values(input).to(mean.dtype), None, None, mean, var, split_sizes, eps)
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
    normalized = normalize(_values(input).to(mean.dtype), mean_product, mean_grad, mean, var, split_sizes, eps)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    result = (_values(grad) - normalized) * _to_rows(scale, split_sizes)
    return result.to(input.dtype).reshape(input.shape)
