"""The steps of split_batch_norm as separate ops, for norms that add up their sums over ranks.

All take the input as (N, C, P), statistics and parameters as (S, C) in the dtype of statistics, and run on the kernels
of split_batch_norm:

- forward: `split_statistics`, combine means and variances over ranks, `split_normalize`;
- backward: `split_backward_sums`, which are the gradients of this rank's weight and bias; add them up over ranks and
  divide by the number of values; `split_backward_input`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paper_layers._core.library import define
from paper_layers.ops.split_batch_norm import formulas


def _normalize(input: Tensor, *others: Any) -> Tensor:
    return formulas.in_layout(formulas.normalize(input, *others), input)


def _input(grad: Tensor, input: Tensor, *others: Any) -> Tensor:
    return formulas.in_layout(formulas.backward_input(grad, input, *others), input)


_STATISTICS = "Tensor mean, Tensor var"
_SPLIT = "SymInt[] split_sizes, float eps"

split_statistics = define(
    "split_batch_norm_statistics(Tensor input, SymInt[] split_sizes) -> (Tensor, Tensor)",
    formulas.statistics,
    formulas.empty_statistics,
    decompose=True,
)
split_normalize = define(
    f"split_batch_norm_normalize(Tensor input, Tensor? weight, Tensor? bias, {_STATISTICS}, {_SPLIT}) -> Tensor",
    _normalize,
    lambda input, *_: formulas.empty(input),
    decompose=True,
)
split_backward_sums = define(
    f"split_batch_norm_backward_sums(Tensor grad, Tensor input, {_STATISTICS}, {_SPLIT}) -> (Tensor, Tensor)",
    formulas.backward_sums,
    lambda grad, input, mean, var, split_sizes, eps: formulas.empty_statistics(input, split_sizes),
    decompose=True,
)
split_backward_input = define(
    f"split_batch_norm_backward_input(Tensor grad, Tensor input, Tensor? weight, {_STATISTICS}, Tensor mean_product,"
    f" Tensor mean_grad, {_SPLIT}) -> Tensor",
    _input,
    lambda grad, input, *_: formulas.empty(input),
    decompose=True,
)
