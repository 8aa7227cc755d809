"""What the ops' rules for vmap share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def one_by_one(
    function: Callable[..., tuple[Tensor, ...]], batch_size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A call for each element, for ops that have no batch of independent calls."""
    results = [
        function(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(arguments, in_dims, strict=False)))
        for i in range(batch_size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
