"""Detect wrappers of a model that a surgery must not change it under."""

from __future__ import annotations

import torch
from torch import nn

# By name: an import would load all of torch.distributed.
_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def check_free(model: nn.Module) -> None:
    """Refuse non-modules, scripted modules, and models in a wrapper that has registered their parameters."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where}: expected a module in Python, got a scripted one; swap first, and then script")
        wrapper = _wrapper(module)
        if wrapper is not None:
            raise ValueError(
                f"{where}: expected a module that nothing wraps, got one of {wrapper}, which does not learn of new "
                "parameters; swap first, and wrap the model then"
            )


def _wrapper(module: nn.Module) -> str | None:
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.") and kind.__name__ in _WRAPPERS:
            return kind.__name__
    for parameter in module.parameters(recurse=False):
        if type(parameter).__name__ == "DTensor":
            return "FSDP or tensor parallelism (its parameters are DTensors)"
        if type(parameter).__name__ == "FlatParameter" or getattr(parameter, "_fsdp_flattened", False):
            return "FullyShardedDataParallel"
    return None
