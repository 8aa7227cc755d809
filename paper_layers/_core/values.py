"""Refuse values out of range, without synchronizing on accelerators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paper_layers._core import checks
from paper_layers._core._torch_private import assert_async
from paper_layers._core.library import define, library

WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # Torch stores them, and does little else.
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, *WIDE_UNSIGNED)


def _limits(values: Tensor, low: float, other: float | None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value other than `other`; NaN if a value is NaN."""
    return (values if other is None else values.where(values != other, low)).aminmax()


def _within(values: Tensor, low: float, high: float, other: float | None, expected: str) -> Tensor:
    if values.numel():
        for limit in (limit.item() for limit in _limits(values, low, other)):
            if not low <= limit <= high:
                raise ValueError(f"{expected}, got {limit}")
    return values.clone()


def _within_cuda(values: Tensor, low: float, high: float, other: float | None, expected: str) -> Tensor:
    if values.numel():
        smallest, largest = (limit.double() for limit in _limits(values, low, other))
        assert_async((smallest >= low) & (largest <= high), expected)
    return values.clone()


def _within_fake(values: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(values)


_op = define(
    "values_within(Tensor values, Scalar low, Scalar high, Scalar? other, str expected) -> Tensor",
    _within,
    _within_fake,
    decompose=lambda values, *rest: values.clone(),  # ONNX export writes no check.
    vmap=lambda op, _, in_dims, arguments: (op(*arguments), in_dims[0]),
)
library.impl("values_within", _within_cuda, "CUDA")


def within(name: str, values: Tensor, low: float, high: float, expected: str, *, other: float | None = None) -> Tensor:
    """Return a copy, without gradient, of values that are from `low` to `high`, or `other`.

    Use the copy: a compiler drops a check whose result is not used. On CUDA a wrong value is found as an index out of
    range is, after the call and with the message alone: to name the value would be to wait for it.

    Args:
        name: The argument that the error names.
        values: Real numbers of any shape.
        low: The least.
        high: The largest.
        expected: The error's words for what is allowed.
        other: A value that is allowed as well.

    Raises:
        ValueError: A value is not allowed.
    """
    return _op(values.detach(), low, high, other, f"{name}: expected {expected}")


def labels(name: str, values: Tensor, classes: int, ignore_index: int | None = None) -> Tensor:
    """Return a copy of int64 labels; each must be a class from 0 to `classes` - 1, or `ignore_index`."""
    ignored = "" if ignore_index is None else f" or ignore_index, {ignore_index}"
    expected = f"classes from 0 to {classes - 1}{ignored}"
    return within(name, values, 0, classes - 1, expected, other=ignore_index)


def widened(value: Any) -> Any:
    """Return a tensor of any integer dtype as int64, which torch's losses take, and all else as it is."""
    return value.long() if isinstance(value, Tensor) and value.dtype in _INTEGERS else value


def integers(name: str, value: Tensor, *sizes: int | str) -> Tensor:
    """Return a tensor of any integer dtype as int64, of these sizes, where names stand for any."""
    return checks.int64(name, widened(value), *sizes)
