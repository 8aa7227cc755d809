"""Decide whether a fused path may read a layer's parameters. Where it may not, the layer must be called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from paper_layers._core._torch_private import FakeTensor, FunctionalTensor, has_any_global_hook

F = TypeVar("F", bound=Callable[..., Any])

# Tensors whose values a product may read. The last two stand for plain ones while torch traces.
_PLAIN = (Tensor, nn.Parameter, type(None), FakeTensor, FunctionalTensor)

# The forward of each class whose layers fused paths read, before anybody could replace it.
_FORWARDS: dict[type[nn.Module], Any] = {}


def known(*kinds: type[nn.Module]) -> None:
    """Let fused paths read the layers of these classes, as long as the classes keep their forward."""
    _FORWARDS.update((kind, kind.forward) for kind in kinds)


def unchanged(kind: type[nn.Module]) -> bool:
    """Return True where the class is `known` and has the forward that it had then."""
    return kind.forward is _FORWARDS.get(kind)


known(nn.Linear, nn.Sequential, nn.Identity, nn.Dropout, nn.ReLU, nn.LeakyReLU, nn.PReLU)
known(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def is_plain(tensor: Any) -> bool:
    """Return True for None and for a tensor that is no DTensor, quantised tensor or other subclass."""
    return type(tensor) in _PLAIN


def unwatched(layer: nn.Module) -> bool:
    """Return True where a call of the layer runs the forward of its class and nothing else."""
    return not (
        "forward" in layer.__dict__
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or has_any_global_hook()
    )


def readable(layer: Any, *kinds: type[nn.Module]) -> bool:
    """Return True where a fused path may read the layer's weight and bias in place of calling the layer.

    The layer is exactly of one of these classes, so it is no subclass, wrapper, parametrised, quantised or sharded
    layer; its class's forward is `unchanged`; nothing waits for its call, as hooks, pruning and off-loading do; its
    weight and bias are plain tensors.
    """
    if type(layer) not in kinds or not unchanged(type(layer)) or not unwatched(layer):
        return False
    own, parameters = layer.__dict__, layer._parameters
    # A layer that torch replicates, or that prunes itself, has its weight as a plain attribute.
    weight, bias = parameters.get("weight", own.get("weight")), parameters.get("bias", own.get("bias"))
    return type(weight) in _PLAIN and type(bias) in _PLAIN


def parameter_dtype(layer: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """Return the dtype of the layer's floating parameters, or `otherwise` if it has none."""
    for parameter in layer._parameters.values():  # The usual case, without the walk through all modules.
        if parameter is not None and parameter.is_floating_point():
            return parameter.dtype
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), otherwise)


def method(module: nn.Module, name: str) -> Callable[..., Any]:
    """Return the method of this name, around which FSDP2 gathers sharded parameters as around `forward`."""
    if hasattr(type(module), "unshard") and name not in module.__dict__:
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(module, name)
    return cast(Callable[..., Any], getattr(module, name))


def forward_method(function: F) -> F:
    """Decorate a method that users call beside `forward`, so that it works on a module that FSDP2 has sharded."""

    @functools.wraps(function)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if hasattr(type(self), "unshard") and function.__name__ not in self.__dict__:
            return method(self, function.__name__)(*args, **kwargs)
        return function(self, *args, **kwargs)

    return cast(F, call)


def within(module: nn.Module, name: str) -> Callable[..., Any]:
    """Return a `forward_method` for a call within `forward`, at whose end FSDP2 would shard the module too early."""
    if not hasattr(type(module), "unshard"):
        return cast(Callable[..., Any], getattr(module, name))
    function = getattr(type(module), name)
    return functools.partial(getattr(function, "__wrapped__", function), module)
