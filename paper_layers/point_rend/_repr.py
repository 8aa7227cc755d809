"""The text of a module's options."""

from torch import nn


def options(module: nn.Module, *names: str) -> str:
    """Return the module's attributes of these names, as `extra_repr` shows them."""
    return ", ".join(f"{name}={getattr(module, name)}" for name in names)
