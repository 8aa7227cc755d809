"""Rules for `torch.vmap`: how one call of an op computes a whole batch of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Takes a function, the size of the vmapped dimension, where it is in each argument (or None), and the arguments;
# returns the results, and where the dimension is in each of them.
Rule = Callable[[Callable[..., Any], int, tuple[Any, ...], tuple[Any, ...]], tuple[Any, Any]]


def one_by_one(
    function: Callable[..., Any], batch_size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Call the function once for each element, for ops without a batch dimension."""

    def element(argument: Any, dim: Any, i: int) -> Any:
        if not isinstance(dim, int):
            return argument
        if batch_size == 0:
            return argument.new_zeros(argument.movedim(dim, 0).shape[1:])
        return argument.select(dim, i)

    # Without elements, one of zeros tells the shapes of the results.
    results = [
        function(*(element(a, d, i) for a, d in zip(arguments, in_dims, strict=True)))
        for i in range(max(1, batch_size))
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)[:batch_size], 0
    stacked = tuple(torch.stack(parts)[:batch_size] for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def as_clouds(
    function: Callable[..., Any], batch_size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Call ops that take (N, C) or clouds (B, N, C) once: each element is a cloud of its own, or several."""
    if batch_size == 0:
        return one_by_one(function, batch_size, in_dims, arguments)
    dims = arguments[0].dim() - isinstance(in_dims[0], int)
    if dims == 3:
        return folded()(function, batch_size, in_dims, arguments)
    batched = (
        (a.movedim(d, 0) if isinstance(d, int) else a.expand(batch_size, *a.shape)) if isinstance(a, Tensor) else a
        for a, d in zip(arguments, in_dims, strict=True)
    )
    results = function(*batched)
    if isinstance(results, Tensor):
        return results, 0
    # An empty tensor stands for a result that nobody asked for.
    return tuple(r.expand(batch_size, 0) if r.shape == (0,) else r for r in results), (0,) * len(results)


def folded(into: int = 0, renumber: Callable[..., tuple[Any, ...]] | None = None) -> Rule:
    """Make a rule for ops whose dimension `into` is one of independent elements: call once, with more of these.

    Args:
        into: The dimension of all arguments and results that the vmapped dimension is moved into; the last one of
            those with fewer dimensions.
        renumber: Called with the batch size and the arguments (B, ...); returns them with numbers of elements that
            count through the batch.
    """

    def rule(
        function: Callable[..., Any], batch_size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        if batch_size == 0:
            return one_by_one(function, batch_size, in_dims, arguments)
        batched = tuple(
            (a.movedim(d, 0) if isinstance(d, int) else a.expand(batch_size, *a.shape)) if isinstance(a, Tensor) else a
            for a, d in zip(arguments, in_dims, strict=True)
        )
        if renumber is not None:
            batched = renumber(batch_size, *batched)
        results = function(*(_fold(a, min(into, a.dim() - 2)) if isinstance(a, Tensor) else a for a in batched))
        if isinstance(results, Tensor):
            return results.unflatten(into, (batch_size, -1)), into
        dims = tuple(min(into, r.dim() - 1) for r in results)
        # An empty tensor stands for a result that nobody asked for.
        parts = tuple(
            r.expand(batch_size, 0) if r.shape == (0,) else r.unflatten(d, (batch_size, -1))
            for r, d in zip(results, dims, strict=True)
        )
        return parts, dims

    return rule


def _fold(tensor: Tensor, into: int) -> Tensor:
    return tensor.movedim(0, into).flatten(into, into + 1)
