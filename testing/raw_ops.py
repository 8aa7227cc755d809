"""Arguments that the raw ops must refuse, or at least survive, made of good ones."""

from __future__ import annotations

import itertools
import os
import resource
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from testing.cases import on_device

# Products of two of these wrap to -1, 0 or a small number. The first of each is more than any memory holds.
HUGE = [(281479271743489, 65535), (6148914691236517205, 3), (2**56, 2**8), (2**62, 2)]


def _changed(arguments: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> Iterator[tuple[Any, ...]]:
    """The arguments with one tensor changed, also one within a list."""
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            yield (*arguments[:i], change(argument), *arguments[i + 1 :])
        elif isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
            for part in _changed(tuple(argument), change):
                yield (*arguments[:i], list(part), *arguments[i + 1 :])


def _shorter(tensor: Tensor, dim: int, size: int) -> Tensor:
    return tensor.narrow(dim, 0, min(size, tensor.shape[dim])) if tensor.dim() > dim else tensor


def wrong_arguments(arguments: tuple[Any, ...], device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments to refuse: one tensor at a time of another dtype, with a dimension more, or on another device."""
    # The dispatcher would not show the kernels a tensor of "meta": `attempt` goes past it.
    elsewhere = "meta" if device == "cpu" else "cpu"
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "dtype": lambda t: t.long() if t.is_floating_point() or t.dtype == torch.bool else t.double(),
        "a dimension more": lambda t: t[None],
        "device": lambda t: t.to(elsewhere),
    }
    for name, change in changes.items():
        every = list(_changed(arguments, change))
        if name == "device" and len(every) == 1:  # which then is the device of the call
            continue
        for number, changed in enumerate(every):
            yield f"{name} of tensor {number}", changed


def odd_arguments(arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Arguments to survive: tensors that are shorter, or empty, and integers out of range."""
    for size in (0, 1):
        for dim in range(4):
            yield from _changed(arguments, lambda t, d=dim, s=size: _shorter(t, d, s))
    for i, argument in enumerate(arguments):
        if isinstance(argument, int) and not isinstance(argument, bool):
            for number in (-1, 0, 2**48, 2**62, 2**63 - 1, -(2**63)):
                yield (*arguments[:i], number, *arguments[i + 1 :])
    for number in (-2, -(2**63), 2**62, 2**63 - 1):
        yield from _changed(arguments, lambda t, v=number: t if t.dtype != torch.int64 else torch.full_like(t, v))


def sizes_without_elements(arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Make one of the sizes zero and two of them huge, where no tensor has elements then."""
    tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
    sizes = sorted({size for tensor in tensors for size in tensor.shape})

    def resized(argument: Any, to: dict[int, int]) -> Any:
        if isinstance(argument, list):
            return [resized(a, to) for a in argument]
        if isinstance(argument, Tensor):
            shape = [to.get(size, size) for size in argument.shape]
            return argument.new_empty(shape) if 0 in shape else argument if shape == [*argument.shape] else None
        return to.get(argument, argument) if isinstance(argument, int) and not isinstance(argument, bool) else argument

    for zero, first, second in itertools.product(sizes, repeat=3):
        if zero in (first, second):
            continue
        for huge in HUGE:
            try:
                changed = tuple(resized(a, {second: huge[1], first: huge[0], zero: 0}) for a in arguments)
            except RuntimeError:  # More elements than torch counts.
                continue
            if not any(a is not None and b is None for a, b in zip(arguments, changed, strict=True)):
                yield changed


def survives(calls: Callable[[], None], seconds: int = 60) -> bool:
    """Return whether a process of its own survives the calls, within so many seconds of the processor."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        torch.set_num_threads(1)  # Those of the parent are not there.
        try:
            calls()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def in_layout(argument: Any, layout: torch.memory_format) -> Any:
    """Copies of the arguments, images in a layout."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(in_layout(a, layout) for a in argument)
    if isinstance(argument, Tensor):
        return argument.clone(memory_format=layout if argument.dim() == 4 else torch.contiguous_format)
    return argument


def has_kernel(name: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"paper_layers::{name}", device.upper())


def attempt(op: Any, arguments: tuple[Any, ...], device: str) -> Exception | None:
    """The error of the device's kernel, wherever the arguments are, on copies of what it may write to."""
    copies = [a.clone() if isinstance(a, Tensor) and a.numel() else a for a in arguments]
    try:
        op.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper())), *copies)
    except Exception as error:
        return error
    return None


def attempt_on_gpu(op: Any, arguments: tuple[Any, ...], device: str) -> None:
    """Call a GPU's kernel, if one is tested, with what the CPU's takes: a number out of range would end its work."""
    if device != "cpu" and attempt(op, arguments, "cpu") is None:
        attempt(op, on_device(arguments, device), device)
        torch.accelerator.synchronize()
