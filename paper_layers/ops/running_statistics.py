"""Move the running statistics of batch norms in place, of several norms by one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paper_layers._core.library import define


class Running(NamedTuple):
    """Running statistics of S norms, and how they move: see `move_running_statistics`."""

    mean: Sequence[Tensor]
    var: Sequence[Tensor]
    batches: Sequence[Tensor]
    momentum: float | None

    def count_versions(self) -> None:
        """Tell autograd that an op has written to the statistics."""
        torch.autograd.graph.increment_version((*self.mean, *self.var, *self.batches))


@torch.no_grad()
def reference(
    running_mean: list[Tensor],
    running_var: list[Tensor],
    batches: list[Tensor],
    mean: Tensor,
    var: Tensor,
    counts: list[int],
    counted: Tensor | None,
    momentum: float | None,
) -> None:
    """Compute `move_running_statistics` in PyTorch."""
    norms = len(running_mean)
    many: Any = counts if counted is None else counted.reshape(-1).unbind()
    for i, (new_mean, new_var) in enumerate(zip(mean.reshape(norms, -1), var.reshape(norms, -1), strict=True)):
        share: Any = momentum
        if batches:
            batches[i].add_(1)
            share = batches[i].to(mean.dtype).reciprocal() if momentum is None else momentum
        elif momentum is None:
            share = 0.0
        count = many[i]
        # count / (count - 1) would be float32 for a tensor of integers.
        unbiased = new_var * count / (torch.sym_max(count - 1, 1) if counted is None else (count - 1).clamp(min=1))
        for running, new in ((running_mean[i], new_mean), (running_var[i], unbiased)):
            moved = (running + share * (new - running)).to(running.dtype)
            if counted is not None:
                running.copy_(torch.where(count > 1, moved, running))
            elif count > 1:
                running.copy_(moved)


def _vmap(function: Any, batch_size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[None, None]:
    def element(argument: Any, dims: Any, i: int) -> Any:
        if isinstance(argument, Tensor):
            return argument if dims is None else argument.select(dims, i)
        if isinstance(dims, list | tuple):
            return [element(one, dim, i) for one, dim in zip(argument, dims, strict=True)]
        return argument

    written = [dim for dims in in_dims[:3] if dims is not None for dim in dims]
    if None in written or any(dims is None and tensors for dims, tensors in zip(in_dims, arguments[:3], strict=False)):
        raise RuntimeError(
            "running_mean, running_var, num_batches_tracked: expected one of each for every element of the vmapped "
            "dimension, because training moves them in place; got the same for all. Without running statistics "
            "(track_running_stats=False) the norm needs none: see torch.func.replace_all_batch_norm_modules_"
        )
    for i in range(batch_size):
        function(*(element(a, d, i) for a, d in zip(arguments, in_dims, strict=True)))
    return None, None


_op = define(
    "move_running_statistics_(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor(c!)[] batches, Tensor mean,"
    " Tensor var, SymInt[] counts, Tensor? counted, float? momentum) -> ()",
    reference,
    lambda *_: None,
    vmap=_vmap,
)


def move_running_statistics(running: Running, mean: Tensor, var: Tensor, counts: Sequence[int] | Tensor) -> None:
    """Count one more batch of each of S norms, and move its running statistics in place, as torch's norms do.

    A norm with fewer than two values in this batch only counts the batch.

    Args:
        running: The running statistics: means, S tensors (C,); variances, likewise, which move towards the unbiased
            variance; the numbers of batches, S int64 tensors with one element, or none; the share of this batch, or
            None for the average of all batches, which needs their numbers.
        mean: Means of this batch, S * C elements of float32 or float64.
        var: Biased variances, likewise.
        counts: Number of values in each mean: S ints, or S int64 elements that the host does not know.
    """
    if mean.requires_grad or var.requires_grad:
        mean, var = mean.detach(), var.detach()
    on_host, on_device = ([], counts) if isinstance(counts, Tensor) else ([*counts], None)
    # Exported graphs hold the formula: ONNX has no ops that write.
    op = reference if torch.compiler.is_exporting() else _op
    op([*running.mean], [*running.var], [*running.batches], mean, var, on_host, on_device, running.momentum)
    if not torch.compiler.is_compiling():  # Compiled graphs copy into the statistics.
        running.count_versions()
