"""Build the pool that does a convolution's stride."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from paper_layers.lip.pool import LIPPool2d, Logit


def own_logit(logit: Logit, factory: dict[str, Any]) -> Logit:
    """Return the logit for one of several pools: a copy, if it is a module."""
    return copy.deepcopy(logit).to(**factory) if isinstance(logit, nn.Module) else logit


def stride_pool(conv: nn.Conv2d, logit: Logit, hidden_channels: int, factory: dict[str, Any]) -> LIPPool2d:
    """Return the pool that does the stride of a convolution."""
    rows, columns = conv.stride
    kernel_size = (rows | 1, columns | 1)
    padding = (rows // 2, columns // 2)  # Half the kernel, as rows | 1 is 2 * (rows // 2) + 1.
    options = {"logit": own_logit(logit, factory), "hidden_channels": hidden_channels, **factory}
    return LIPPool2d(conv.out_channels, kernel_size, (rows, columns), padding, **options).train(conv.training)
