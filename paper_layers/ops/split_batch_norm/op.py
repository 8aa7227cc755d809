"""Batch normalisation of several parts of a batch, each with its own statistics: the op and its function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paper_layers._core import checks
from paper_layers._core.aliases import distinct
from paper_layers._core.autograd import Function
from paper_layers._core.library import define
from paper_layers._core.tracing import leaf
from paper_layers._core.vmap import extent
from paper_layers.ops.split_batch_norm import formulas

_Options = tuple[list[int], float]


def _reference(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, split_sizes: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = formulas.statistics(input, split_sizes)
    output = formulas.normalize(input, weight, bias, mean, var, split_sizes, eps)
    return formulas.in_layout(output, input), mean, var


def _fake(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, split_sizes: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return formulas.empty(input), *_fake_sums(input, split_sizes)


def _fake_sums(input: Tensor, split_sizes: list[int]) -> tuple[Tensor, Tensor]:
    shape, dtype = (len(split_sizes), input.shape[1]), formulas.statistics_dtype(input.dtype)
    return input.new_empty(shape, dtype=dtype), input.new_empty(shape, dtype=dtype)


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


def _backward_fake(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    split_sizes: list[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return formulas.empty(input), *_fake_sums(input, split_sizes)


_forward_op = define(
    "split_batch_norm(Tensor input, Tensor? weight, Tensor? bias, SymInt[] split_sizes, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)
_backward_op = define(
    "split_batch_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor mean, Tensor var,"
    " SymInt[] split_sizes, float eps) -> (Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
)
# ONNX export knows no op of ours, only what it is made of.
torch._decomp.register_decomposition(_forward_op)(_reference)
torch._decomp.register_decomposition(_backward_op)(_backward_reference)


def _fold(info: Any, in_dims: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Move a vmapped dimension of each tensor, (N, C, P) or (S, C), into its channels."""
    folded: list[Tensor | None] = []
    for tensor, dim in zip(tensors, in_dims, strict=False):
        if tensor is None:
            folded.append(None)
        elif dim is None:
            folded.append(tensor.unsqueeze(1).expand(-1, info.batch_size, *tensor.shape[1:]).flatten(1, 2))
        else:
            folded.append(tensor.movedim(dim, 1).flatten(1, 2))
    return folded


def _unfold(
    info: Any, in_dim: int | None, like: Tensor, tensors: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The vmapped dimension before the channels again, of which each element has as many as `like`."""
    parts = tuple(t.unflatten(1, (info.batch_size, extent(like, in_dim, 1))) for t in tensors)
    return parts, (1,) * len(parts)


class _SplitBatchNorm(Function):
    @staticmethod
    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward_op(input, weight, bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, weight, bias, ctx.options = inputs
        _, mean, var = output
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(input, weight, mean, var)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, weight, mean, var = ctx.saved_tensors
        grads = _SplitBatchNormBackward.apply(*distinct(grad, input, weight, mean, var), ctx.options)
        return grads[0], grads[1] if weight is not None else None, grads[2] if ctx.has_bias else None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        options: _Options,
    ) -> Any:
        results = _SplitBatchNorm.apply(*_fold(info, in_dims, (input, weight, bias)), options)
        return _unfold(info, in_dims[0], input, results)


class _SplitBatchNormBackward(Function):
    @staticmethod
    def forward(
        grad: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _backward_op(grad, input, weight, mean, var, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        grad, input, weight, _, _, ctx.options = inputs
        ctx.save_for_backward(grad, input, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Mean and variance are functions of the input, so their share of the derivative is already in its own.
        grad, input, weight = ctx.saved_tensors
        split_sizes, eps = ctx.options
        affine = input.new_ones(len(split_sizes), input.shape[1], dtype=grads[1].dtype) if weight is None else weight

        def first_order(grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            def norm(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                mean, var = formulas.statistics(input, split_sizes)
                return formulas.normalize(input, weight, bias, mean, var, split_sizes, eps)

            return torch.func.vjp(norm, input, weight, torch.zeros_like(weight))[1](grad)

        grad_grad, grad_input, grad_weight = torch.func.vjp(first_order, grad, input, affine)[1](grads)
        return grad_grad, grad_input, None if weight is None else grad_weight, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        grad: Tensor,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        var: Tensor,
        options: _Options,
    ) -> Any:
        folded = _fold(info, in_dims, (grad, input, weight, mean, var))
        return _unfold(info, in_dims[0], grad, _SplitBatchNormBackward.apply(*folded, options))


def parameters(name: str, values: Tensor | Sequence[Tensor] | None, splits: int, input: Tensor) -> Tensor | None:
    """The parameters of all splits as one tensor (S, C) in the dtype of statistics."""
    if values is None:
        return None
    _check_splits(name, values, splits, input)
    dtype = formulas.statistics_dtype(input.dtype)
    for value in values:
        if value.dtype not in (input.dtype, dtype):
            expected = dict.fromkeys((str(input.dtype), str(dtype)))
            raise TypeError(f"{name}: expected {' or '.join(expected)} for this input, got {value.dtype}")
    stacked = values if isinstance(values, Tensor) else torch.stack(list(values))
    return stacked.to(dtype)


def _check_splits(name: str, values: Tensor | Sequence[Tensor], splits: int, input: Tensor) -> None:
    """A tensor of the input's channels for each split."""
    channels = input.shape[1]
    if len(values) != splits or any(value.shape != (channels,) for value in values):
        got = tuple(values.shape) if isinstance(values, Tensor) else [tuple(value.shape) for value in values]
        raise ValueError(f"{name}: expected shape ({splits}, {channels}) or {splits} tensors ({channels},), got {got}")
    for value in values:
        checks.same_device(name, value, "input", input)


def check_split_sizes(input: Tensor, split_sizes: Sequence[int], values: int = 2) -> list[int]:
    """Return the sizes that make up the batch, of so many values per channel or more each, as ints."""
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
    """The output, and the mean and the biased variance of each split, (S, C), which carry no gradient."""
    splits = len(split_sizes)
    stacked = [parameters(name, values, splits, input) for name, values in (("weight", weight), ("bias", bias))]
    flat = input.flatten(2) if input.dim() > 2 else input[..., None]
    output, mean, var = _SplitBatchNorm.apply(*distinct(flat, *stacked), (list(split_sizes), float(eps)))
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
        # Not times count / (count - 1), which is float32 where the count is a tensor of integers.
        for running, new in ((running_mean[i], mean[i]), (running_var[i], var[i] * count / (count - 1))):
            moved = new.to(running.dtype)
            if isinstance(count, Tensor):
                moved = torch.where(count > 0, moved, running)
            running.lerp_(moved, momentum)


@leaf
def split_batch_norm(
    input: Tensor,
    split_sizes: Sequence[int],
    running_mean: Tensor | Sequence[Tensor] | None = None,
    running_var: Tensor | Sequence[Tensor] | None = None,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalise consecutive parts of a batch, each by its own statistics and parameters, in one pass.

    .. math:: y_s = \frac{x_s - \mathrm{E}[x_s]}{\sqrt{\mathrm{Var}[x_s] + \epsilon}} \gamma_s + \beta_s

    What the main and auxiliary batch norms of section 4.2 in Xie et al., "Adversarial Examples Improve Image
    Recognition", CVPR 2020, do to a batch in training. Each part is as `torch.nn.functional.batch_norm` with
    ``training=True`` has it. Half types compute in float32, and may have float32 parameters.

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
    if input.dim() < 2:
        raise ValueError(f"input: expected shape (N, C, ...), got {tuple(input.shape)}")
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
