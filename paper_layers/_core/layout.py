"""The order of images' elements in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(input: Tensor) -> torch.memory_format:
    """The layout of the outputs: channels_last where the input has it and is not contiguous as well."""
    if not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
