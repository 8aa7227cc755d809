"""The dtypes that sums are computed in."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def accumulation(*tensors: Tensor) -> torch.dtype:
    """Return the promoted dtype of the tensors, float32 at least."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
