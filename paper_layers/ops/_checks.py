"""Argument checks that the ops share: each error names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def pair(name: str, value: int | tuple[int, int] | list[int], minimum: int) -> list[int]:
    """An integer or a pair of integers, each at least `minimum`, as a list of two."""
    both = list(value) if isinstance(value, tuple | list) else [value, value]
    if len(both) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in both):
        raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
    if min(both) < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value!r}")
    return both


def floating(name: str, value: Tensor) -> None:
    """A tensor of one of the dtypes that the kernels compute in."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(f"{name}: expected one of {expected}, got {value.dtype}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors on one device."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")


def integer(name: str, value: int, minimum: int) -> None:
    """An integer of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value!r}")


def number(name: str, value: float) -> None:
    """A number, whole or not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def int64(name: str, value: Tensor, *sizes: int | str) -> None:
    """An int64 tensor of these sizes, where names stand for any."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 Tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    fits = zip(value.shape, sizes, strict=False)
    if value.dim() != len(sizes) or any(isinstance(want, int) and got != want for got, want in fits):
        expected = ", ".join(map(str, sizes)) + ("," if len(sizes) == 1 else "")
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(value.shape)}")


def neighbors(name: str, value: Tensor, *sizes: int | str) -> None:
    """A table of neighbours: int64 of these sizes, where names stand for any, and k columns."""
    int64(name, value, *sizes, "k")


def numbers(name: str, value: Tensor) -> None:
    """An int64 tensor of one dimension."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 1:
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected an int64 Tensor of one dimension, got {got}")
