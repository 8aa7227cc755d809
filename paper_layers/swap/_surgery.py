"""What every surgery does: choose modules and change them where they stand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

from torch import nn

Filter = Callable[[nn.Module, str], bool]
M = TypeVar("M", bound=nn.Module)


def select(
    model: nn.Module,
    wanted: str,
    kinds: tuple[type[M], ...],
    results: tuple[type[nn.Module], ...],
    filter: Filter | None,
    condition: Callable[[Any], bool] = lambda module: True,
) -> dict[M, str]:
    """The modules of exactly these classes that `filter` accepts, each with the name that it was accepted under.

    Subclasses compute something else and are left alone. Empty if the model holds one of `results`, of an earlier swap.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Module, got {type(model).__name__}")
    everything = list(model.named_modules(remove_duplicate=False))
    found = [(name, m) for name, m in everything if type(m) in kinds and condition(m)]
    chosen = {m: name for name, m in reversed(found) if filter is None or filter(m, name)}
    if not chosen and not any(type(m) in results for _, m in everything):
        rejected = f" that filter accepts ({len(found)} without it)" if found else ""
        raise ValueError(f"model: expected at least one {wanted} to swap{rejected}, got none in {type(model).__name__}")
    for module, name in chosen.items():
        if "forward" in vars(module):
            raise ValueError(f"{called(name)}: expected the forward of its class, got one set on the object")
    return dict(reversed(chosen.items()))


def called(name: str) -> str:
    return f"model.{name}" if name else "model"


def become(old: nn.Module, new: nn.Module) -> None:
    """Turn `old` into `new` where it stands. It keeps its hooks (the very dictionaries) and training mode."""
    new.train(old.training)
    kept = {key: value for key, value in vars(old).items() if "_hook" in key}
    old.__class__ = type(new)
    old.__dict__ = {**vars(new), **kept}


def placement(model: nn.Module, name: str) -> dict[str, Any]:
    """Device and dtype of the module's parameters, or of the nearest ones around it."""
    module = model.get_submodule(name)
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            return {"device": tensor.device, "dtype": tensor.dtype}
    return placement(model, name.rpartition(".")[0]) if name else {}
