"""Count the ops that a call dispatches, in forward and backward: the same number on any machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def dispatched_ops(run: Callable[[], Any]) -> list[str]:
    """Return the names of the ops that a second run dispatches to a backend; the first one warms up."""
    run()
    with _Recorder() as recorder:
        run()
    return recorder.names
