"""Detect recomputed forward passes under checkpointing, and run them in their original contexts."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from paper_layers._core._torch_private import CheckpointFrame, in_backward

Context = Callable[[], AbstractContextManager[None]]


def recomputing() -> bool:
    """Return True where `torch.utils.checkpoint` computes a forward pass again for its backward."""
    # A compiled graph moves statistics by its own rules.
    return in_backward() and not torch.compiler.is_compiling()


class _Open(threading.local):
    """The contexts of `reopened` that this thread is in, the outermost first."""

    def __init__(self) -> None:
        self.contexts: tuple[Context, ...] = ()


_open = _Open()


@contextmanager
def reopened(context: Context) -> Iterator[None]:
    """Enter ``context()``, and enter it again when a function checkpointed inside it is recomputed."""
    if torch.compiler.is_compiling():  # The compiled graph holds its own recomputation.
        with context():
            yield
        return
    _watch_checkpoints()
    before = _open.contexts
    _open.contexts = (*before, context)
    try:
        with context():
            yield
    finally:
        _open.contexts = before


def _in_open_contexts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, run in the contexts that are open now."""
    contexts = _open.contexts

    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(reopened(context))
            return function(*args, **kwargs)

    return run if contexts else function


@functools.cache
def _watch_checkpoints() -> None:
    """Make torch's two forms of checkpointing keep the open contexts with the functions they recompute."""
    frame: Any = CheckpointFrame
    reentrant: Any = CheckpointFunction
    make_frame, forward = frame.__init__, reentrant.forward

    def make_kept_frame(self: Any, recompute_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        make_frame(self, _in_open_contexts(recompute_fn), *args, **kwargs)

    def kept_forward(ctx: Any, *args: Any) -> Any:
        outputs = forward(ctx, *args)
        ctx.run_function = _in_open_contexts(ctx.run_function)
        return outputs

    frame.__init__ = functools.wraps(make_frame)(make_kept_frame)
    reentrant.forward = staticmethod(functools.wraps(forward)(kept_forward))
