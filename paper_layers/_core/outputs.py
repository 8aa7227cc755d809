"""Keep outputs for a backward although layers that follow may write over them, as they may over those of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def save(ctx: Any, tensors: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]) -> None:
    """Save tensors for the backward, and outputs beside them: `load` returns both.

    Torch refuses a backward that finds a saved output changed. Here it is kept with its version, unless somebody has
    hooks on what is saved, as checkpointing and off-loading do, which would not see it.
    """
    ctx.complete, ctx.outputs = torch.compiler.is_compiling(), None
    if ctx.complete:  # Copies, which the compiler drops where nobody writes.
        ctx.save_for_backward(*tensors, *(output.clone() for output in outputs))
        return
    ctx.save_for_backward(*tensors)
    if (
        any(ctx.needs_input_grad)
        and not outputs[0].is_inference()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(outputs[0])
    ):
        ctx.outputs = [(output.detach(), output._version) for output in outputs]


def load(ctx: Any, again: Callable[..., tuple[Tensor, ...]]) -> tuple[Any, ...]:
    """Return the saved tensors and the outputs: ``again(*tensors)`` where these were written to or not kept."""
    tensors = ctx.saved_tensors
    if ctx.complete:
        return tuple(tensors)
    # Kept for one backward: the context may live on with the loss.
    outputs, ctx.outputs = ctx.outputs, None
    if outputs is None or any(output._version != version for output, version in outputs):
        return *tensors, *again(*(None if t is None else t.detach() for t in tensors))
    return *tensors, *(output for output, _ in outputs)
