"""Batch normalisation of several parts of a batch, each with its own statistics: the op and its function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paper_layers._core import checks, dtypes
from paper_layers._core.differentiable import differentiable
from paper_layers._core.library import define
from paper_layers._core.tracing import leaf
from paper_layers._core.vmap import folded
from paper_layers.ops.split_batch_norm import formulas


def _reference(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, split_sizes: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = formulas.statistics(input, split_sizes)
    output = formulas.normalize(input, weight, bias, mean, var, split_sizes, eps)
    return formulas.in_layout(output, input), mean, var


def _fake(input: Tensor, weight: Any, bias: Any, split_sizes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return formulas.empty(input), *formulas.empty_statistics(input, split_sizes)


def _backward_reference(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    split_sizes: list[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight, grad_bias = formulas.backward_sums(grad, input, mean, var, split_sizes, eps)
    counts = [torch.sym_max(size * input.shape[2], 1) for size in split_sizes]  # The mean of nothing is not used.
    mean_product, mean_grad = (
        torch.stack([row / count for row, count in zip(sums.unbind(), counts, strict=True)])
        for sums in (grad_weight, grad_bias)
    )
    grad_input = formulas.backward_input(grad, input, weight, mean, var, mean_product, mean_grad, split_sizes, eps)
    return formulas.in_layout(grad_input, input), grad_weight, grad_bias


def _backward_fake(grad: Tensor, input: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return formulas.empty(input), *formulas.empty_statistics(input, others[-2])


_forward_op = define(
    "split_batch_norm(Tensor input, Tensor? weight, Tensor? bias, SymInt[] split_sizes, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    decompose=True,
)
_backward_op = define(
    "split_batch_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor mean, Tensor var,"
    " SymInt[] split_sizes, float eps) -> (Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    decompose=True,
)


def _formula(
    grad: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, split_sizes: list[int], eps: float
) -> tuple[Tensor, ...]:
    # Mean and variance are functions of the input.
    affine = mean.new_ones(mean.shape) if weight is None else weight

    def norm(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        statistics = formulas.statistics(input, split_sizes)
        return formulas.normalize(input, weight, bias, *statistics, split_sizes, eps)

    gradients: tuple[Tensor, ...] = torch.func.vjp(norm, input, affine, torch.zeros_like(affine))[1](grad)
    return gradients


# A vmapped dimension goes into the channels.
_normalized = differentiable(
    "split_batch_norm",
    _forward_op,
    _backward_op,
    formula=_formula,
    vmap=folded(1),
    outputs=3,
    saved=(0, 1),
    kept=(1, 2),
    constant=(1, 2),
)


def per_split_parameters(
    name: str, values: Tensor | Sequence[Tensor] | None, splits: int, input: Tensor
) -> Tensor | None:
    """Return the parameters of all splits as one tensor (S, C) in the dtype of statistics."""
    if values is None:
        return None
    _check_splits(name, values, splits, input)
    dtype = dtypes.accumulation(input)
    for value in values:
        if value.dtype not in (input.dtype, dtype):
            expected = dict.fromkeys((str(input.dtype), str(dtype)))
            raise TypeError(f"{name}: expected {' or '.join(expected)} for this input, got {value.dtype}")
    stacked = values if isinstance(values, Tensor) else torch.stack(list(values))
    return stacked.to(dtype)


def _check_splits(name: str, values: Tensor | Sequence[Tensor], splits: int, input: Tensor) -> None:
    """Check for one tensor (C,) for each split."""
    channels = input.shape[1]
    if len(values) != splits or any(value.shape != (channels,) for value in values):
        got = tuple(values.shape) if isinstance(values, Tensor) else [tuple(value.shape) for value in values]
        raise ValueError(f"{name}: expected shape ({splits}, {channels}) or {splits} tensors ({channels},), got {got}")
    for value in values:
        checks.same_device(name, value, "input", input)


def check_split_sizes(input: Tensor, split_sizes: Sequence[int], values: int = 2) -> list[int]:
    """Return the split sizes as ints; each has no values, or at least `values` per channel."""
    if len(split_sizes) == 0 or not all(checks.is_integer(size) for size in split_sizes):
        raise TypeError(f"split_sizes: expected at least one int, got {split_sizes!r}")
    split_sizes = [checks.integer("split_sizes", size, 0) for size in split_sizes]
    if sum(split_sizes) != input.shape[0]:
        raise ValueError(f"split_sizes: expected sizes that sum to the batch, {input.shape[0]}, got {split_sizes!r}")
    pixels = input.shape[2:].numel()
    if any(0 < size * pixels < values for size in split_sizes):
        raise ValueError(
            f"split_sizes: expected at least {values} values per channel in each split, or none, got {split_sizes!r} "
            f"for an input of shape {tuple(input.shape)}"
        )
    return split_sizes


def normalize_splits(
    input: Tensor,
    weight: Tensor | Sequence[Tensor] | None,
    bias: Tensor | Sequence[Tensor] | None,
    split_sizes: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and the mean and the biased variance of each split, (S, C), without gradient."""
    splits = len(split_sizes)
    stacked = [
        per_split_parameters(name, values, splits, input) for name, values in (("weight", weight), ("bias", bias))
    ]
    flat = input.flatten(2) if input.dim() > 2 else input[..., None]
    output, mean, var = _normalized(flat, *stacked, (list(split_sizes), float(eps)))
    return output.reshape(input.shape), mean, var


@torch.no_grad()
def update_statistics(
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    counts: Sequence[Any],
    momenta: Sequence[Any],
) -> None:
    """Move each split's running statistics by its momentum towards the mean and the unbiased variance of `counts`.

    Splits without values move nothing. Counts are numbers, or tensors of which the host does not know the values.
    """
    for i, (count, momentum) in enumerate(zip(counts, momenta, strict=True)):
        if not isinstance(count, Tensor) and count == 0:
            continue
        # count / (count - 1) would be float32 for a tensor of integers.
        for running, new in ((running_mean[i], mean[i]), (running_var[i], var[i] * count / (count - 1))):
            moved = new.to(running.dtype)
            if isinstance(count, Tensor):
                moved = torch.where(count > 0, moved, running)
            running.lerp_(moved, momentum)


@leaf
def split_batch_norm(
    input: Tensor,
    split_sizes: Sequence[int],
    *,
    running_mean: Tensor | Sequence[Tensor] | None = None,
    running_var: Tensor | Sequence[Tensor] | None = None,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalise consecutive parts of a batch, each by its own statistics and parameters, in one pass.

    .. math:: y_s = \frac{x_s - \mathrm{E}[x_s]}{\sqrt{\mathrm{Var}[x_s] + \epsilon}} \gamma_s + \beta_s

    The main and auxiliary batch norms of Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020,
    section 4.2, in training. Each part equals `torch.nn.functional.batch_norm` with ``training=True``. Half
    types compute in float32, and may have float32 parameters.

    Args:
        input: Batch of shape (N, C) or (N, C, ...); float32, float64, bfloat16 or float16.
        split_sizes: Number of consecutive samples in each of S parts; they sum to N. A part may be empty: it moves no
            statistics.
        running_mean: Means to update in place: one tensor (S, C) or S tensors (C,).
        running_var: Variances to update in place, unbiased, likewise.
        weight: Weights :math:`\gamma`, likewise, in the input's dtype or float32; None for ones.
        bias: Biases :math:`\beta`, likewise; None for zeros.
        momentum: Share of this batch in the running statistics.
        eps: Added to the variance.

    Returns:
        Tensor of the input's shape, dtype and memory format.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, sizes or devices do not fit, or a part has one value per channel, whose variance is 0.

    Example:
        >>> import torch, paper_layers
        >>> clean, adversarial = torch.randn(2, 8, 16, 32, 32)
        >>> x = torch.cat([clean, adversarial])
        >>> paper_layers.split_batch_norm(x, [8, 8]).shape
        torch.Size([16, 16, 32, 32])
    """
    checks.floating("input", input)
    momentum = checks.number("momentum", momentum)
    eps = checks.number("eps", eps)
    checks.shape("input", input, ("N", "C", "..."))
    split_sizes = check_split_sizes(input, split_sizes)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_var: expected to be given with running_mean, got only one of them")
    if running_mean is not None and running_var is not None:
        _check_splits("running_mean", running_mean, len(split_sizes), input)
        _check_splits("running_var", running_var, len(split_sizes), input)
    output, mean, var = normalize_splits(input, weight, bias, split_sizes, eps)
    if running_mean is not None and running_var is not None:
        counts = [size * input.shape[2:].numel() for size in split_sizes]
        momenta = [momentum] * len(counts)
        update_statistics(list(running_mean), list(running_var), mean, var, counts, momenta)
    return output
