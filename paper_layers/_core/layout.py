"""Memory formats of images."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(input: Tensor) -> torch.memory_format:
    """Return the outputs' memory format: channels_last if the input is, and is not contiguous too."""
    if not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
