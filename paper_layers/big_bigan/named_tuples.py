"""Named tuples that `torch.export.save` can write."""

from __future__ import annotations

from typing import TypeVar

from torch.utils import _pytree

T = TypeVar("T", bound=type)


def exported(kind: T) -> T:
    """Give a named tuple the name that it has in exported programs; `torch.export.load` needs its import first."""
    _pytree._register_namedtuple(kind, serialized_type_name=f"paper_layers.big_bigan.{kind.__name__}")
    return kind
