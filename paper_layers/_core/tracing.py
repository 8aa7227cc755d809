"""Modules and functions that torch.fx keeps as one node, like torch's own."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import nn
from torch.fx import Proxy
from torch.overrides import has_torch_function

P = ParamSpec("P")
R = TypeVar("R")


class Leaf(nn.Module):
    """A module that is one node in the graphs of torch.fx, torchvision's and timm's feature extractors.

    Tracers know torch's own modules by the name of their Python module, and trace through all others.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class a code object of its own for `__call__`: torch.compile keeps few graphs for each."""
        super().__init_subclass__(**kwargs)
        call: Any = cls.__call__
        if getattr(call, "__code__", None) == Leaf.__call__.__code__:
            own = types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
            cls.__call__ = functools.update_wrapper(own, call)  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, or add a node that runs it to the graph that is being traced."""
        # Without a loop in Python where nothing is traced.
        tracer = tracer_of(args, kwargs) if kwargs or has_torch_function(args) else None
        if tracer is None:
            return super().__call__(*args, **kwargs)

        def node(*args: Any, **kwargs: Any) -> Proxy:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        return tracer.call_module(self, node, args, kwargs)


def leaf(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function one node in the graphs of torch.fx, wherever it is called from.

    `torch.fx.wrap` finds only calls from the module that it is called in.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        tracer = tracer_of(args, kwargs)
        if tracer is None:
            return function(*args, **kwargs)
        node: Any = tracer.create_proxy("call_function", call, args, kwargs)
        return node

    return call


def tracer_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the tracer of the first traced argument, or None."""
    values = (*args, *kwargs.values()) if kwargs else args
    if has_torch_function(values):  # Plain tensors have none, and this asks without a loop in Python.
        for value in values:
            if isinstance(value, Proxy):
                return value.tracer
    return None
