"""Argument checks. Each error names the argument, what was expected and what came."""

from __future__ import annotations

import numbers as kinds
import operator
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer as torch's functions take it: NumPy's integers are, bools are not."""
    if isinstance(value, bool | Tensor):
        return False
    if isinstance(value, int | torch.SymInt):
        return True
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def pair(name: str, value: Any, minimum: int) -> list[int]:
    """Return two integers of at least `minimum`, from a pair, or from one integer alone or in a list."""
    if value.__class__ is int and value >= minimum:  # The usual form, at little cost.
        return [value, value]
    both = list(value) if isinstance(value, tuple | list) else [value]
    both = both * 2 if len(both) == 1 else both
    if len(both) != 2 or not all(is_integer(v) for v in both):
        raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
    both = [_plain(v) for v in both]
    if min(both) < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value!r}")
    return both


def floating(name: str, value: Tensor) -> None:
    """Check for a tensor of one of the kernels' dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(f"{name}: expected one of {expected}, got {value.dtype}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Check for two tensors on one device."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")


def shape(name: str, value: Tensor, *forms: tuple[int | str, ...]) -> None:
    """Check for one of several shapes. Names stand for any size, a last "..." for any number of dimensions."""
    sizes = value.shape
    for form in forms:
        if form[-1] == "...":
            form = form[:-1]
            if len(sizes) < len(form):
                continue
        elif len(sizes) != len(form):
            continue
        for size, want in zip(sizes, form, strict=False):
            if want.__class__ is not str and size != want:
                break
        else:
            return
    expected = " or ".join(f"({', '.join(map(str, form))}{',' if len(form) == 1 else ''})" for form in forms)
    raise ValueError(f"{name}: expected shape {expected}, got {tuple(sizes)}")


def _plain(value: Any) -> Any:
    # A symbolic size stays as it is: reading it would fix it.
    return value if isinstance(value, int | torch.SymInt) else operator.index(value)


def integer(name: str, value: Any, minimum: int) -> int:
    """Return an integer of at least `minimum` as an int."""
    if value.__class__ is int and value >= minimum:  # Nearly always, so at no cost.
        return value
    if not is_integer(value):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    plain: int = _plain(value)
    if plain < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value!r}")
    return plain


def positive(**values: Any) -> tuple[int, ...]:
    """Return integers of at least 1 as ints; each keyword names its argument."""
    return tuple(integer(name, value, 1) for name, value in values.items())


def probability(name: str, value: Any) -> float:
    """Return a number from 0 to 1."""
    plain = number(name, value)
    if not 0 <= plain <= 1:
        raise ValueError(f"{name}: expected from 0 to 1, got {value!r}")
    return plain


def choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Check for one of a few strings."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def features(name: str, value: Tensor, count: int) -> None:
    """Check for a floating tensor of shape (N, count)."""
    floating(name, value)
    shape(name, value, ("N", count))


def number(name: str, value: Any) -> float:
    """Return a number as an int or a float."""
    if isinstance(value, int | float | torch.SymInt | torch.SymFloat) and not isinstance(value, bool):
        return cast(float, value)
    if is_integer(value):
        return operator.index(value)
    if not isinstance(value, kinds.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)


def int64(name: str, value: Tensor, *sizes: int | str) -> Tensor:
    """Return an int64 or int32 tensor as int64; sizes are numbers, or names for any size."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected an int64 Tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    shape(name, value, sizes)
    return value.long()


def neighbors(name: str, value: Tensor, *sizes: int | str) -> Tensor:
    """Return a table of neighbours, with a last dimension k, as int64; sizes as in `int64`."""
    return int64(name, value, *sizes, "k")


def numbers(name: str, value: Tensor) -> Tensor:
    """Return an int64 or int32 tensor of one dimension as int64."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32) or value.dim() != 1:
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected an int64 Tensor of one dimension, got {got}")
    return value.long()
