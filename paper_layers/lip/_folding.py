"""Make blocks refuse to fold a norm into a `LIPConv2d`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from paper_layers._core.surgery import format_path

_FOLDS = ("fuse", "reparameterize", "switch_to_deploy")  # Methods of blocks that fold their norms into convolutions.


class _Refusal:
    """Replace a block's method that folds its convolutions."""

    def __init__(self, method: str, conv: str):
        self.method, self.conv = method, conv

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Refuse."""
        raise RuntimeError(
            f"{self.method}: expected plain convolutions, got the LIPConv2d {self.conv}, which nothing can be "
            f"folded into; call {self.method} first, then swap"
        )


def refuse_to_fold(model: nn.Module, name: str) -> None:
    """Make the blocks around a convolution refuse to fold it: they would read its weight, whatever its class."""
    for end in range(name.count(".") + 1):
        block = model.get_submodule(".".join(name.split(".")[:end]))
        for method in _FOLDS:
            if _takes_nothing(getattr(type(block), method, None)):
                vars(block)[method] = _Refusal(method, format_path(name))


def _takes_nothing(method: Any) -> bool:
    """Return True if a method can be called without arguments, as folding methods are; others only share the name."""
    if not inspect.isfunction(method):
        return False
    _, *arguments = inspect.signature(method).parameters.values()
    ways = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(a.default is not a.empty or a.kind in ways for a in arguments)
