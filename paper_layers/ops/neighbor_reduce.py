"""Reductions over the neighbours of each row: the op, its backward, and the function that users call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paper_layers._core import checks, dtypes
from paper_layers._core.differentiable import differentiable
from paper_layers._core.library import define
from paper_layers._core.tracing import leaf
from paper_layers._core.vmap import as_clouds
from paper_layers.ops.flat_index import across_clouds, check_rows

REDUCTIONS = ("max", "min", "sum", "mean")


def _gathered(input: Tensor, index: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """Return one neighbour of each row, and where it exists, without a tensor of size M x k x C."""
    return input[index[:, column].clamp(min=0)], index[:, column, None] >= 0


def _reference(input: Tensor, index: Tensor, reduce: str, relative: bool) -> tuple[Tensor, Tensor]:
    if input.dim() == 3:
        output, arg = _reference(input.flatten(0, 1), across_clouds(index, input.shape[1]), reduce, relative)
        shape = (*index.shape[:2], input.shape[2])
        return output.view(shape), arg.view(shape) if arg.dim() == 2 else arg
    check_rows(index, len(input))
    dtype = dtypes.accumulation(input)
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
        # The first of equal values wins; NaN is beyond all others, as in torch.
        better = there & ((arg < 0) | better | (rows.isnan() & ~output.isnan()))
        output, arg = rows.to(dtype).where(better, output), arg.where(~better, column)
    if relative:
        output = (output - input).where(arg >= 0, 0)
    return output.to(input.dtype), arg


def _fake(input: Tensor, index: Tensor, reduce: str, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (*index.shape[:-1], input.shape[-1])
    return input.new_empty(shape), index.new_empty(shape if reduce in ("max", "min") else 0, dtype=torch.int32)


def _backward_reference(grad: Tensor, index: Tensor, arg: Tensor, rows: int, reduce: str, relative: bool) -> Tensor:
    if grad.dim() == 3:
        clouds, flat = len(grad), across_clouds(index, rows)
        chosen = arg.flatten(0, 1) if arg.dim() == 3 else arg
        result = _backward_reference(grad.flatten(0, 1), flat, chosen, clouds * rows, reduce, relative)
        return result.view(clouds, rows, grad.shape[2])
    dtype = dtypes.accumulation(grad)
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


def _backward_fake(grad: Tensor, index: Tensor, arg: Tensor, rows: int, *_: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-2], rows, grad.shape[-1])


_forward_op = define(
    "neighbor_reduce(Tensor input, Tensor index, str reduce, bool relative) -> (Tensor, Tensor)", _reference, _fake
)
_backward_op = define(
    "neighbor_reduce_backward(Tensor grad, Tensor index, Tensor arg, SymInt rows, str reduce, bool relative) -> Tensor",
    _checked_backward,
    _backward_fake,
)


def _forward(
    input: Tensor, index: Tensor, like: Tensor | None, rows: int, reduce: str, relative: bool
) -> tuple[Tensor, Tensor]:
    return _forward_op(input, index, reduce, relative)


def _backward(
    grad: Tensor, index: Tensor, like: Tensor | None, arg: Tensor, rows: int, reduce: str, relative: bool
) -> Tensor:
    return _backward_op(grad, index, arg, rows if like is None else like.shape[-2], reduce, relative)


def _second_order(
    along: tuple[Tensor], grad: Tensor, index: Tensor, like: Any, arg: Tensor, rows: int, reduce: str, relative: bool
) -> tuple[Tensor]:
    # The reduction is linear once the choice is made.
    if reduce in ("sum", "mean"):
        return (_reduced(along[0], index, like, (rows, reduce, relative))[0],)
    chosen = along[0].gather(-2, index.gather(-1, arg.clamp(min=0).long()).clamp(min=0))
    return ((chosen - along[0] if relative else chosen).where(arg >= 0, 0),)


_reduced = differentiable(
    "neighbor_reduce",
    _forward,
    _backward,
    second=_second_order,
    vmap=as_clouds,
    outputs=2,
    saved=(1, 2),
    kept=(1,),
    constant=(1,),
)


@leaf
def neighbor_reduce(input: Tensor, index: Tensor, reduction: str = "max", *, relative: bool = False) -> Tensor:
    r"""Reduce the rows of each node's neighbours, or their differences to its own, without storing them.

    .. math:: y_i = \max_{j \in \mathcal{N}(i)} x_j \quad \text{or} \quad
              y_i = \max_{j \in \mathcal{N}(i)} (x_j - x_i)

    The aggregation of graph convolutions, equations 2 and 4 of Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as
    Deep as CNNs?", ICCV 2019. The largest of the differences is the difference of the largest bit by bit.

    Args:
        input: Features of shape (N, C) or (B, N, C); float32, float64, bfloat16 or float16.
        index: Neighbours, int64 of shape (M, k) or (B, M, k), the rows of `input` (in (B, N, C), of its own cloud);
            -1 is no neighbour, and any other number an error.
        reduction: "max", "min", "sum" or "mean". Of equal values the first takes the gradient; half types are summed in
            float32.
        relative: Reduce the differences to the node's own row; M is N.

    Returns:
        Features of shape (M, C) or (B, M, C); 0 where a node has no neighbours.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or `reduction` do not fit.
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
    checks.shape("input", input, ("N", "C"), ("B", "N", "C"))
    index = checks.neighbors("index", index, *input.shape[:-2], "M")
    checks.same_device("index", index, "input", input)
    checks.choice("reduction", reduction, REDUCTIONS)
    if relative and index.shape[-2] != input.shape[-2]:
        raise ValueError(f"index: expected {input.shape[-2]} rows with relative, got {index.shape[-2]}")
    if torch.compiler.is_compiling():
        # Dynamo loses a symbolic number that only the backward needs; a tensor's size it keeps.
        return _reduced(input, index, input.new_empty(*input.shape[:-1], 0), (0, reduction, relative))[0]
    return _reduced(input, index, None, (input.shape[-2], reduction, relative))[0]
