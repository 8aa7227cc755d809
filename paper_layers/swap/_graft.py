"""Finished models that get a class of ours before their own, and hooks that see what they compute within."""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Grafted(nn.Module):
    """Comes before the host's own class in a class that `graft` makes; super() is the host."""

    # The host's class may have attributes of any name.
    _graft_prefix: str  # Of the new class's name.
    _graft_added: str  # The name of the child that we add.
    _graft_arguments: tuple[inspect.Parameter, ...] = ()  # Our forward's arguments beside the host's.

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the two classes: the one that is made of them cannot be found by its name."""
        return (_blank, type(self).__bases__, *super().__reduce_ex__(max(protocol, 2))[2:])


class SequentialGraft(Grafted):
    """Of an nn.Sequential, whose forward calls what it holds one after the other, but not what we have added."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([module for name, module in self.named_children() if name != self._graft_added])


@functools.cache
def graft(ours: Any, host: Any) -> Any:
    """The host's class with ours before it, and a forward with the signature of the host's."""
    members = {"__module__": ours.__module__, "__doc__": ours.__doc__}
    if ours._graft_arguments:
        members["forward"] = _with_signature(ours.forward, host.forward, ours._graft_arguments)
    return type(f"{ours._graft_prefix}{host.__name__}", (ours, host), members)


def _with_signature(function: Any, host: Any, arguments: tuple[inspect.Parameter, ...]) -> Any:
    """A copy of a function that tells tools by `inspect.signature` to take the host's arguments, and some more."""
    parameters = inspect.signature(host).parameters
    old = [parameter for name, parameter in parameters.items() if name not in {new.name for new in arguments}]
    # Each kind in its place: `**kwargs` comes last.
    merged = sorted([*old, *arguments], key=lambda parameter: parameter.kind)
    same = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    same.__kwdefaults__, same.__doc__, same.__annotations__ = (
        function.__kwdefaults__,
        function.__doc__,
        function.__annotations__,
    )
    same.__dict__["__signature__"] = inspect.Signature(merged)
    return same


def _blank(ours: Any, host: Any) -> Any:
    kind = graft(ours, host)
    return kind.__new__(kind)


class Tap:
    """A forward hook that hands a module's output over to the model around it, while that one runs and no longer.

    Each thread has its own. Of several calls the last counts.
    """

    def __init__(self, module: nn.Module):
        self.outputs: dict[int, Any] = {}
        # Pickled with the hook, this keeps its number from being given to another one where it is loaded.
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if _thread() in self.outputs:
            self.outputs[_thread()] = output

    def open(self) -> None:
        self.outputs[_thread()] = None

    def close(self) -> Any:
        return self.outputs.pop(_thread())


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
