"""The formulas of split batch norm on tensors (N, C, P): what its ops compute where there is no kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paper_layers._core import dtypes


def is_channels_last(input: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side, as in all channels_last formats, and not the pixels as well."""
    return not input.is_contiguous() and input.transpose(1, 2).is_contiguous()


def in_layout(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of the shape and dtype of an output, in the layout that outputs for this input have."""
    return empty(like).copy_(tensor) if is_channels_last(like) else tensor.contiguous()


def empty_statistics(input: Tensor, split_sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Two results (S, C) in the dtype of statistics, not yet computed."""
    shape, dtype = (len(split_sizes), input.shape[1]), dtypes.accumulation(input)
    return input.new_empty(shape, dtype=dtype), input.new_empty(shape, dtype=dtype)


def empty(like: Tensor) -> Tensor:
    """An output, not yet computed. No view: those of a custom Function must not be changed in place by what follows."""
    return torch.empty_like(like) if is_channels_last(like) else like.new_empty(like.shape)


def statistics(input: Tensor, split_sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each split's channels, both of shape (S, C); 0 of a split without values."""
    parts = input.to(dtypes.accumulation(input)).split(list(split_sizes))
    empty = [part.numel() == 0 for part in parts]
    mean = [part.sum((0, 2)) if none else part.mean((0, 2)) for part, none in zip(parts, empty, strict=True)]
    var = [
        part.sum((0, 2)) if none else part.var((0, 2), correction=0) for part, none in zip(parts, empty, strict=True)
    ]
    return torch.stack(mean), torch.stack(var)


def _to_rows(values: Tensor, split_sizes: Sequence[int]) -> Tensor:
    """Values (S, C) of each split for each of its images: (N, C, 1)."""
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
    """Each split with its statistics and parameters; differentiable to any order."""
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
    """Over each split's channels, the sums of grad times the normalised input and of grad, both of shape (S, C)."""
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
    """The gradient of the input, from the two sums of `backward_sums` over the number of values in each."""
    normalized = normalize(input.to(mean.dtype), mean_product, mean_grad, mean, var, split_sizes, eps)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    return ((grad - normalized) * _to_rows(scale, split_sizes)).to(input.dtype)
