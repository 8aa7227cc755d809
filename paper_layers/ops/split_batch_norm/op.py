"""Batch normalisation of several parts of a batch, each with its own statistics: the op and its function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paper_layers._core import checks, dtypes
from paper_layers._core._torch_private import in_transform
from paper_layers._core.differentiable import differentiable
from paper_layers._core.library import define
from paper_layers._core.tracing import leaf
from paper_layers._core.vmap import folded
from paper_layers.ops import running_statistics
from paper_layers.ops.running_statistics import Running, move_running_statistics
from paper_layers.ops.split_batch_norm import formulas


def _reference(
    input: Tensor, weight: list[Tensor], bias: list[Tensor], split_sizes: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = formulas.statistics(input, split_sizes)
    output = formulas.normalize(input, formulas.table(weight), formulas.table(bias), mean, var, split_sizes, eps)
    return formulas.in_layout(output, input), mean, var


def _fake(input: Tensor, weight: Any, bias: Any, split_sizes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return formulas.empty(input), *formulas.empty_statistics(input, split_sizes)


def _training_reference(
    input: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    running_mean: list[Tensor],
    running_var: list[Tensor],
    batches: list[Tensor],
    split_sizes: list[int],
    eps: float,
    momentum: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    output, mean, var = _reference(input, weight, bias, split_sizes, eps)
    pixels = input.shape[2:].numel()
    counts = [size * pixels for size in split_sizes]
    running_statistics.reference(running_mean, running_var, batches, mean, var, counts, None, momentum)
    return output, mean, var


def _backward_reference(
    grad: Tensor,
    input: Tensor,
    weight: list[Tensor],
    mean: Tensor,
    var: Tensor,
    biases: int,
    split_sizes: list[int],
    eps: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    products, sums = formulas.backward_sums(grad, input, mean, var, split_sizes, eps)
    values = input.shape[2:].numel()
    counts = [torch.sym_max(size * values, 1) for size in split_sizes]  # The mean of nothing is not used.
    mean_product, mean_grad = (
        torch.stack([row / count for row, count in zip(of.unbind(), counts, strict=True)]) for of in (products, sums)
    )
    table = formulas.table(weight)
    grad_input = formulas.backward_input(grad, input, table, mean, var, mean_product, mean_grad, split_sizes, eps)
    like = weight or [products if biases == 1 < len(split_sizes) else products[0]] * biases
    return (
        formulas.in_layout(grad_input, input),
        formulas.untable(products, weight),
        formulas.untable(sums, like if biases else []),
    )


def _backward_fake(
    grad: Tensor, input: Tensor, weight: list[Tensor], mean: Tensor, var: Tensor, biases: int, sizes: Any, eps: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    like = weight or [mean if biases == 1 < len(sizes) else mean[0]] * biases
    dtype, ones = formulas.dtype_of(like), (weight, like if biases else [])
    grad_weight, grad_bias = ([mean.new_empty(one.shape, dtype=dtype) for one in some] for some in ones)
    return formulas.empty(input), grad_weight, grad_bias


# Weights and biases are S tensors (C,), or one (S, C), or none.
_forward_op = define(
    "split_batch_norm(Tensor input, Tensor[] weight, Tensor[] bias, SymInt[] split_sizes, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    decompose=True,
)
# The same, and running statistics move.
_training_op = define(
    "split_batch_norm_training_(Tensor input, Tensor[] weight, Tensor[] bias, Tensor(a!)[] running_mean,"
    " Tensor(b!)[] running_var, Tensor(c!)[] batches, SymInt[] split_sizes, float eps, float? momentum)"
    " -> (Tensor, Tensor, Tensor)",
    _training_reference,
    lambda input, weight, bias, mean, var, batches, split_sizes, *_: _fake(input, weight, bias, split_sizes, 0.0),
)
# The gradients of `biases` biases are like the weights; without weights they are as many tensors as the biases.
_backward_op = define(
    "split_batch_norm_backward(Tensor grad, Tensor input, Tensor[] weight, Tensor mean, Tensor var, int biases,"
    " SymInt[] split_sizes, float eps) -> (Tensor, Tensor[], Tensor[])",
    _backward_reference,
    _backward_fake,
    decompose=True,
)


# The settings of these three are: number of weights, number of biases, split sizes, eps, running statistics or None.
def _forward(input: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *parameters, weights, _, split_sizes, eps, running = others
    weight, bias = parameters[:weights], parameters[weights:]
    results: tuple[Tensor, Tensor, Tensor]
    if running is None:
        results = _forward_op(input, weight, bias, split_sizes, eps)
    else:
        mean, var, batches, momentum = running
        results = _training_op(input, weight, bias, mean, var, batches, split_sizes, eps, momentum)
        running.count_versions()
    return results


def _backward(grad: Tensor, input: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *weight, mean, var, _, biases, split_sizes, eps, _ = others
    grad_input, grad_weight, grad_bias = _backward_op(grad, input, weight, mean, var, biases, split_sizes, eps)
    return grad_input, *grad_weight, *grad_bias


def _formula(grad: Tensor, input: Tensor, *others: Any) -> tuple[Tensor, ...]:
    # Mean and variance are functions of the input.
    *weight, mean, _, _, biases, split_sizes, eps, _ = others
    like = weight or [mean if biases == 1 < len(mean) else mean[0]] * biases
    bias = [torch.zeros_like(one) for one in like] if biases else []

    def norm(input: Tensor, *parameters: Tensor) -> Tensor:
        tables = formulas.table(parameters[: len(weight)]), formulas.table(parameters[len(weight) :])
        return formulas.normalize(input, *tables, *formulas.statistics(input, split_sizes), split_sizes, eps)

    gradients: tuple[Tensor, ...] = torch.func.vjp(norm, input, *weight, *bias)[1](grad)
    return gradients


# The differentiable op for each number of weights, which its backward takes.
_normalized: dict[int, Any] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _make_normalized(weights: int) -> None:
    if weights not in _normalized:
        _normalized[weights] = differentiable(
            f"split_batch_norm_{weights}",
            _forward,
            _backward,
            formula=_formula,
            vmap=folded(1),  # A vmapped dimension goes into the channels.
            outputs=3,
            saved=tuple(range(1 + weights)),
            kept=(1, 2),
            constant=(1, 2),
        )


def check_parameters(name: str, values: Tensor | Sequence[Tensor] | None, splits: int, input: Tensor) -> None:
    """Check for None, or one tensor (C,) for each split, of the input's dtype or of that of statistics."""
    if values is None:
        return
    _check_splits(name, values, splits, input)
    for value in [values] if isinstance(values, Tensor) else values:
        if value.dtype != input.dtype and value.dtype != dtypes.accumulation(input):
            expected = dict.fromkeys((str(input.dtype), str(dtypes.accumulation(input))))
            raise TypeError(f"{name}: expected {' or '.join(expected)} for this input, got {value.dtype}")


def _check_splits(name: str, values: Tensor | Sequence[Tensor], splits: int, input: Tensor) -> None:
    """Check for one tensor (C,) for each split."""
    channels = input.shape[1]
    if len(values) != splits or any(value.shape != (channels,) for value in values):
        got = tuple(values.shape) if isinstance(values, Tensor) else [tuple(value.shape) for value in values]
        raise ValueError(f"{name}: expected shape ({splits}, {channels}) or {splits} tensors ({channels},), got {got}")
    for value in values:
        checks.same_device(name, value, "input", input)


def _check_split_sizes(input: Tensor, split_sizes: Sequence[int]) -> list[int]:
    """Return the split sizes as ints that sum to the batch."""
    if len(split_sizes) == 0 or not all(checks.is_integer(size) for size in split_sizes):
        raise TypeError(f"split_sizes: expected at least one int, got {split_sizes!r}")
    split_sizes = [checks.integer("split_sizes", size, 0) for size in split_sizes]
    if sum(split_sizes) != input.shape[0]:
        raise ValueError(f"split_sizes: expected sizes that sum to the batch, {input.shape[0]}, got {split_sizes!r}")
    return split_sizes


def refuse_one_value(split_sizes: Sequence[int], input: Tensor) -> None:
    """Raise the error for a split of one value per channel."""
    raise ValueError(
        f"split_sizes: expected at least 2 values per channel in each split, or none, got {split_sizes!r} "
        f"for an input of shape {tuple(input.shape)}"
    )


def normalize_splits(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    split_sizes: list[int],
    eps: float,
    running: Running | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and the mean and the biased variance of each split, (S, C); move the running statistics.

    Weights and biases are lists of S tensors (C,), or of one (S, C), or empty. Only the output has a gradient.
    """
    number = len(weights)
    apart = None
    if torch.compiler.is_compiling() or in_transform() or number not in _normalized:
        _make_normalized(number)
        running, apart = None, running  # A Function that is traced or transformed must not write to anything.
    settings = (number, len(biases), split_sizes, eps, running)
    result: tuple[Tensor, Tensor, Tensor] = _normalized[number](input, *weights, *biases, settings)
    if apart is not None:
        pixels = input.shape[2:].numel()
        move_running_statistics(apart, result[1], result[2], [size * pixels for size in split_sizes])
    return result


def _listed(
    weight: Tensor | Sequence[Tensor] | None, bias: Tensor | Sequence[Tensor] | None, splits: int
) -> list[list[Tensor]]:
    """Return lists of parameters. One tensor for all splits stays one, unless the other parameters are one a split."""
    given = (weight, bias)
    stacked = splits > 1 and not any(isinstance(values, Sequence) for values in given)
    return [
        [] if values is None else [values] if stacked and isinstance(values, Tensor) else [*values] for values in given
    ]


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
    split_sizes = _check_split_sizes(input, split_sizes)
    pixels = input.shape[2:].numel()
    if 1 in [size * pixels for size in split_sizes]:
        refuse_one_value(split_sizes, input)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_var: expected to be given with running_mean, got only one of them")
    if running_mean is not None and running_var is not None:
        _check_splits("running_mean", running_mean, len(split_sizes), input)
        _check_splits("running_var", running_var, len(split_sizes), input)
    check_parameters("weight", weight, len(split_sizes), input)
    check_parameters("bias", bias, len(split_sizes), input)
    running = None
    if running_mean is not None and running_var is not None:
        running = Running([*running_mean], [*running_var], [], momentum)
    weights, biases = _listed(weight, bias, len(split_sizes))
    return normalize_splits(input, weights, biases, split_sizes, eps, running)[0]
