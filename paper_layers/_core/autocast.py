"""Turn autocast off, at no cost when it is off already."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocasts(kind: str) -> bool:
    """Return whether autocast is on for this device type."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Disable autocast on this device type."""
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()
