"""Named tuples that `torch.export.save` can write."""

from __future__ import annotations

from typing import TypeVar

from paper_layers._core._torch_private import register_namedtuple

T = TypeVar("T", bound=type)


def exported(kind: T) -> T:
    """Register a named tuple for exported programs; import its module before `torch.export.load`."""
    register_namedtuple(kind, serialized_type_name=f"paper_layers.big_bigan.{kind.__name__}")
    return kind
