"""Whether autocast is on, and a way around it that costs little where it is off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocasts(kind: str) -> bool:
    """Whether autocast is on for this type of device."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Off on this type of device."""
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()
