"""The same tensor as two arguments of one autograd Function, under torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def distinct(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Replace each repeated tensor by a view of itself while compiling: Dynamo refuses the same tensor twice."""
    if not torch.compiler.is_compiling():
        return tensors
    result: list[Tensor | None] = []
    for i, tensor in enumerate(tensors):
        repeated = tensor is not None and any(tensor is other for other in tensors[:i])
        result.append(tensor.view_as(tensor) if tensor is not None and repeated else tensor)
    return tuple(result)
