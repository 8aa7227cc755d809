"""Put a class of ours before a finished model's class, and tap the outputs of its submodules."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Sequence
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from paper_layers._core._torch_private import tree_leaves
from paper_layers._core.tracing import tracer_of


class Grafted(nn.Module):
    """Mixin that `graft` places before the host's class; `super()` is the host."""

    # Prefixed, as the host's class may have attributes of any name.
    _graft_prefix: str  # Prefix of the new class's name.
    _graft_added: str  # Name of the child that we add.
    _graft_arguments: tuple[Parameter, ...] = ()  # Arguments that our forward adds to the host's.

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the two classes: pickle cannot find the class made of them by its name."""
        return (_blank, type(self).__bases__, *super().__reduce_ex__(max(protocol, 2))[2:])


class SequentialGraft(Grafted):
    """Mixin for an `nn.Sequential`: its forward calls its own children in turn, not the added one."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([module for name, module in self.named_children() if name != self._graft_added])


@functools.cache
def graft(ours: Any, host: Any) -> Any:
    """Return the host's class with ours before it, and a forward with the host's signature."""
    members = {"__module__": ours.__module__, "__doc__": ours.__doc__}
    if ours._graft_arguments:
        members["forward"] = _with_names(ours.forward, host.forward, ours._graft_arguments)
    return type(f"{ours._graft_prefix}{host.__name__}", (ours, host), members)


def _with_names(function: Any, host: Any, added: tuple[Parameter, ...]) -> Any:
    """Return a function with the host's arguments and some more, which passes them to another function.

    Tools find their names by `inspect.signature`, and torch.fx finds them in the code itself.
    """
    ours = [parameter.name for parameter in added]
    own = [parameter for name, parameter in inspect.signature(host).parameters.items() if name not in ours]
    # Each kind in its place, as `**kwargs` comes last; and ours come before the host's options.
    merged = sorted([*added, *own], key=lambda parameter: (parameter.kind, parameter.default is not parameter.empty))
    signature = inspect.Signature(merged)
    optional = [p for p in merged if p.default is not p.empty]
    bare = [p.replace(annotation=p.empty, default=None if p in optional else p.empty) for p in merged]
    passed = ", ".join([*_passed(own), *(f"{name}={name}" for name in ours)])
    scope: dict[str, Any] = {"_function": function}
    exec(f"def forward{inspect.Signature(bare)}: return _function({passed})", scope)
    forward = scope["forward"]
    forward.__defaults__ = tuple(p.default for p in optional if p.kind is not p.KEYWORD_ONLY)
    forward.__kwdefaults__ = {p.name: p.default for p in optional if p.kind is p.KEYWORD_ONLY}
    forward.__doc__, forward.__signature__ = function.__doc__, signature
    return forward


def _passed(parameters: list[Parameter]) -> Iterator[str]:
    """Yield the arguments of a call that passes these on, options by name as a host's decorators expect."""
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)  # Then names would come in the way.
    for p in parameters:
        stars = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        option = p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty and not starred
        yield f"{p.name}={p.name}" if option or p.kind is p.KEYWORD_ONLY else f"{stars}{p.name}"


def _blank(ours: Any, host: Any) -> Any:
    kind = graft(ours, host)
    return kind.__new__(kind)


class OutputTap:
    """A forward hook that keeps a module's output for the rest of the enclosing model's forward pass.

    Each thread has its own. Of several calls the last counts.
    """

    def __init__(self, module: nn.Module):
        self.outputs: dict[int, Any] = {}
        # Pickled with the hook, this keeps its number from being given to another one where it is loaded.
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if _thread() in self.outputs:
            self.outputs[_thread()] = self.kept(args, output), torch.is_grad_enabled()

    def kept(self, args: Any, output: Any) -> Any:
        """Return what to keep of a call."""
        return output

    def open(self) -> None:
        self.outputs[_thread()] = None, True

    def close(self) -> tuple[Any, bool]:
        """Return the kept value, and whether gradients were enabled when it was computed."""
        return self.outputs.pop(_thread())


def tapped(
    taps: Sequence[OutputTap], forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, list[Any]]:
    """Call a host's forward; return its output, and what the taps kept."""
    for tap in taps:
        tap.open()
    try:
        tracer = tracer_of(args, kwargs)
        output = forward(*args, **kwargs) if tracer is None else _traced(tracer, forward, args, kwargs)
    finally:
        calls = [tap.close() for tap in taps]
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and forward.__self__.training:
        hidden = [seen for seen, with_gradients in calls if not with_gradients]
        if not all(leaf.requires_grad for leaf in _tensors(hidden)) and _recomputes(output):
            raise ValueError(
                "model: expected checkpoints with use_reentrant=False, got a reentrant one around a layer whose output "
                "is needed with its gradient"
            )
    return output, [seen for seen, _ in calls]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _recomputes(output: Any) -> bool:
    """Return whether the output depends on a reentrant checkpoint."""
    nodes: list[Any] = [tensor.grad_fn for tensor in _tensors(output)]
    found = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in found:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        found.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


def _traced(tracer: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function and run the taps under torch.fx, which skips the hooks of modules that are one node."""
    call_module = tracer.call_module

    def show(module: nn.Module, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = call_module(module, run, args, kwargs)
        for hook in module._forward_hooks.values():
            if isinstance(hook, OutputTap):
                hook(module, args, output)
        return output

    tracer.call_module = show
    try:
        return forward(*args, **kwargs)
    finally:
        tracer.call_module = call_module


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
