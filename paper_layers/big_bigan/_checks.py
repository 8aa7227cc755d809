"""Checks of arguments that several files here make."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paper_layers.ops import _checks


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of a few strings."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def rows(name: str, value: Tensor, features: int, size_name: str) -> None:
    """A floating tensor of shape (N, features)."""
    _checks.floating(name, value)
    if value.dim() != 2 or value.shape[1] != features:
        raise ValueError(f"{name}: expected shape (N, {features}), as {size_name} says, got {tuple(value.shape)}")
