"""What the ops' rules for vmap share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def extent(tensor: Tensor, vmapped: int | None, dim: int) -> int:
    """The size of a dimension in each element of a tensor, of which there may be none."""
    return (tensor if vmapped is None else tensor.movedim(vmapped, -1)).shape[dim]


def one_by_one(
    function: Callable[..., tuple[Tensor, ...]], batch_size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Call the function once for each element, for ops without a batch dimension."""

    def element(argument: Any, dim: Any, i: int) -> Any:
        if not isinstance(dim, int):
            return argument
        if batch_size == 0:
            return argument.new_zeros(argument.movedim(dim, 0).shape[1:])
        return argument.select(dim, i)

    # Without elements, one of zeros tells the shapes of the results.
    results = [
        function(*(element(a, d, i) for a, d in zip(arguments, in_dims, strict=False)))
        for i in range(max(1, batch_size))
    ]
    stacked = tuple(torch.stack(parts)[:batch_size] for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
