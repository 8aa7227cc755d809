"""The steps of split_batch_norm as ops of their own, for a norm whose sums go over ranks in between.

All take the input as (N, C, P), statistics and parameters as (S, C) in the dtype of statistics, and run on the kernels
of split_batch_norm:

- forward: `split_statistics`, combine means and variances over ranks, `split_normalize`;
- backward: `split_backward_sums`, which are the gradients of this rank's weight and bias; add them up over ranks and
  divide by the number of values; `split_backward_input`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paper_layers._core.library import define
from paper_layers.ops.split_batch_norm import formulas


def _fake_sums(input: Tensor, split_sizes: list[int]) -> tuple[Tensor, Tensor]:
    shape, dtype = (len(split_sizes), input.shape[1]), formulas.statistics_dtype(input.dtype)
    return input.new_empty(shape, dtype=dtype), input.new_empty(shape, dtype=dtype)


def _normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    split_sizes: list[int],
    eps: float,
) -> Tensor:
    return formulas.in_layout(formulas.normalize(input, weight, bias, mean, var, split_sizes, eps), input)


def _normalize_fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    split_sizes: list[int],
    eps: float,
) -> Tensor:
    return formulas.empty(input)


def _sums_fake(
    grad: Tensor, input: Tensor, mean: Tensor, var: Tensor, split_sizes: list[int], eps: float
) -> tuple[Tensor, Tensor]:
    return _fake_sums(input, split_sizes)


def _input(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mean_product: Tensor,
    mean_grad: Tensor,
    split_sizes: list[int],
    eps: float,
) -> Tensor:
    result = formulas.backward_input(grad, input, weight, mean, var, mean_product, mean_grad, split_sizes, eps)
    return formulas.in_layout(result, input)


def _input_fake(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mean_product: Tensor,
    mean_grad: Tensor,
    split_sizes: list[int],
    eps: float,
) -> Tensor:
    return formulas.empty(input)


_STATISTICS = "Tensor mean, Tensor var"
_SPLIT = "SymInt[] split_sizes, float eps"

split_statistics = define(
    "split_batch_norm_statistics(Tensor input, SymInt[] split_sizes) -> (Tensor, Tensor)",
    formulas.statistics,
    _fake_sums,
)
split_normalize = define(
    f"split_batch_norm_normalize(Tensor input, Tensor? weight, Tensor? bias, {_STATISTICS}, {_SPLIT}) -> Tensor",
    _normalize,
    _normalize_fake,
)
split_backward_sums = define(
    f"split_batch_norm_backward_sums(Tensor grad, Tensor input, {_STATISTICS}, {_SPLIT}) -> (Tensor, Tensor)",
    formulas.backward_sums,
    _sums_fake,
)
split_backward_input = define(
    f"split_batch_norm_backward_input(Tensor grad, Tensor input, Tensor? weight, {_STATISTICS}, Tensor mean_product,"
    f" Tensor mean_grad, {_SPLIT}) -> Tensor",
    _input,
    _input_fake,
)
for _op, _formula in (
    (split_statistics, formulas.statistics),
    (split_normalize, _normalize),
    (split_backward_sums, formulas.backward_sums),
    (split_backward_input, _input),
):
    torch._decomp.register_decomposition(_op)(_formula)
