"""Reductions over the rows that a table of neighbours names: the op, its backward, and the function that users call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paper_layers._core import checks
from paper_layers._core.aliases import distinct
from paper_layers._core.autograd import Function
from paper_layers._core.library import define
from paper_layers._core.tracing import leaf
from paper_layers.ops.flat_index import check_rows, flat_index

REDUCTIONS = ("max", "min", "sum", "mean")


def _gathered(input: Tensor, index: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """One neighbour of each row, and where there is one: nothing of size M x k x C."""
    return input[index[:, column].clamp(min=0)], index[:, column, None] >= 0


def _reference(input: Tensor, index: Tensor, reduce: str, relative: bool) -> tuple[Tensor, Tensor]:
    check_rows(index, len(input))
    dtype = torch.promote_types(input.dtype, torch.float32)
    shape = (index.shape[0], input.shape[1])
    output = input.new_zeros(shape, dtype=dtype)
    columns = range(index.shape[1] if len(input) else 0)
    if reduce in ("sum", "mean"):
        for column in columns:
            rows, there = _gathered(input, index, column)
            output = output + rows.to(dtype).where(there, 0)
        count = (index >= 0).sum(1, keepdim=True)
        if relative:
            output = output - (count * input.to(dtype)).where(count > 0, 0)
        if reduce == "mean":
            output = output / count.clamp(min=1)
        return output.to(input.dtype), index.new_empty(0, dtype=torch.int32)
    arg = index.new_full(shape, -1, dtype=torch.int32)
    for column in columns:
        rows, there = _gathered(input, index, column)
        better = rows > output if reduce == "max" else rows < output
        # The first of equals; NaN counts as beyond all others, as in torch.
        better = there & ((arg < 0) | better | (rows.isnan() & ~output.isnan()))
        output, arg = rows.to(dtype).where(better, output), arg.where(~better, column)
    if relative:
        output = (output - input).where(arg >= 0, 0)
    return output.to(input.dtype), arg


def _fake(input: Tensor, index: Tensor, reduce: str, relative: bool) -> tuple[Tensor, Tensor]:
    shape = (index.shape[0], input.shape[1])
    return input.new_empty(shape), index.new_empty(shape if reduce in ("max", "min") else 0, dtype=torch.int32)


def _backward_reference(grad: Tensor, index: Tensor, arg: Tensor, rows: int, reduce: str, relative: bool) -> Tensor:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    result = grad.new_zeros(rows, grad.shape[1], dtype=dtype)
    weight = grad.to(dtype)
    count = (index >= 0).sum(1, keepdim=True)
    if reduce == "mean":
        weight = weight / count.clamp(min=1)
    for column in range(index.shape[1] if rows else 0):
        there = index[:, column, None] >= 0
        part = weight.where(there & (arg == column) if reduce in ("max", "min") else there, 0)
        result = result.index_add(0, index[:, column].clamp(min=0), part)
    if relative:
        result = result - weight * (count if reduce in ("sum", "mean") else count > 0)
    return result.to(grad.dtype)


def _checked_backward(grad: Tensor, index: Tensor, arg: Tensor, rows: int, reduce: str, relative: bool) -> Tensor:
    check_rows(index, rows)
    return _backward_reference(grad, index, arg, rows, reduce, relative)


def _backward_fake(grad: Tensor, index: Tensor, arg: Tensor, rows: int, reduce: str, relative: bool) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


_reduce_op = define(
    "neighbor_reduce(Tensor input, Tensor index, str reduce, bool relative) -> (Tensor, Tensor)", _reference, _fake
)
_backward_op = define(
    "neighbor_reduce_backward(Tensor grad, Tensor index, Tensor arg, SymInt rows, str reduce, bool relative) -> Tensor",
    _checked_backward,
    _backward_fake,
)


class _NeighborReduce(Function):
    @staticmethod
    def forward(input: Tensor, index: Tensor, reduce: str, relative: bool) -> tuple[Tensor, Tensor]:
        return _reduce_op(input, index, reduce, relative)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, index, *ctx.settings = inputs
        ctx.rows = input.shape[0]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(index, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_input = _NeighborReduceBackward.apply(*distinct(grad, *ctx.saved_tensors), ctx.rows, *ctx.settings)
        return grad_input, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, index: Tensor, reduce: str, relative: bool) -> Any:
        # Copies side by side, each with its own rows.
        input, index = (
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip((input, index), in_dims, strict=False)
        )
        rows = flat_index(index, input.shape[1])
        output, arg = _NeighborReduce.apply(input.flatten(0, 1), rows, reduce, relative)
        split = (info.batch_size, index.shape[1])
        arg = arg.unflatten(0, split) if arg.dim() == 2 else arg.expand(split[0], 0)
        return (output.unflatten(0, split), arg), (0, 0)


class _NeighborReduceBackward(Function):
    @staticmethod
    def forward(grad: Tensor, index: Tensor, arg: Tensor, rows: int, reduce: str, relative: bool) -> Tensor:
        return _backward_op(grad, index, arg, rows, reduce, relative)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, arg, _, ctx.reduce, ctx.relative = inputs
        ctx.save_for_backward(index, arg)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The reduction is linear once the choice is made.
        index, arg = ctx.saved_tensors
        if ctx.reduce in ("sum", "mean"):
            chosen = _NeighborReduce.apply(grad, index, ctx.reduce, ctx.relative)[0]
        else:
            rows = index.gather(1, arg.clamp(min=0).long())
            chosen = grad.gather(0, rows.clamp(min=0))
            chosen = (chosen - grad if ctx.relative else chosen).where(arg >= 0, 0)
        return chosen, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        grad: Tensor,
        index: Tensor,
        arg: Tensor,
        rows: int,
        reduce: str,
        relative: bool,
    ) -> Any:
        grad, index, arg = (
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip((grad, index, arg), in_dims, strict=False)
        )
        arg = arg.flatten(0, 1)
        result = _NeighborReduceBackward.apply(
            grad.flatten(0, 1), flat_index(index, rows), arg, info.batch_size * rows, reduce, relative
        )
        return result.unflatten(0, (info.batch_size, rows)), 0


@leaf
def neighbor_reduce(input: Tensor, index: Tensor, reduce: str = "max", *, relative: bool = False) -> Tensor:
    r"""Reduce the rows of each node's neighbours, or their differences to its own, without storing them.

    .. math:: y_i = \max_{j \in \mathcal{N}(i)} x_j \quad \text{or} \quad
              y_i = \max_{j \in \mathcal{N}(i)} (x_j - x_i)

    The aggregation of graph convolutions, equations 2 and 4 of Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as
    Deep as CNNs?", ICCV 2019. The largest of the differences is the difference of the largest bit by bit.

    Args:
        input: Features of shape (N, C) or (B, N, C); float32, float64, bfloat16 or float16.
        index: Neighbours, int64 of shape (M, k) or (B, M, k), the rows of `input` (in (B, N, C), of its own cloud);
            -1 is no neighbour, and any other number an error.
        reduce: "max", "min", "sum" or "mean". Of equal values the first takes the gradient; half types are summed in
            float32.
        relative: Reduce the differences to the node's own row; M is N.

    Returns:
        Features of shape (M, C) or (B, M, C); 0 where a node has no neighbours.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or `reduce` do not fit.
        RuntimeError: An index is out of range (on CUDA, as in torch's own indexing, that stops the device's work with
            an assertion).

    Example:
        >>> import torch, paper_layers
        >>> x = torch.randn(2, 1024, 64)
        >>> index, _ = paper_layers.knn(x, k=16)
        >>> paper_layers.neighbor_reduce(x, index, "max").shape
        torch.Size([2, 1024, 64])
    """
    checks.floating("input", input)
    if input.dim() not in (2, 3):
        raise ValueError(f"input: expected shape (N, C) or (B, N, C), got {tuple(input.shape)}")
    index = checks.neighbors("index", index, *input.shape[:-2], "M")
    checks.same_device("index", index, "input", input)
    checks.choice("reduce", reduce, REDUCTIONS)
    if relative and index.shape[-2] != input.shape[-2]:
        raise ValueError(f"index: expected {input.shape[-2]} rows with relative, got {index.shape[-2]}")
    if input.dim() == 2:
        return _NeighborReduce.apply(input, index, reduce, relative)[0]
    rows = flat_index(index, input.shape[1])
    return _NeighborReduce.apply(input.flatten(0, 1), rows, reduce, relative)[0].unflatten(0, index.shape[:2])
