"""Helpers of the surgery tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paper_layers import swap

Surgery = Callable[..., nn.Module]
BOTH = pytest.mark.parametrize("surgery", [swap.pooling, swap.strided_conv])


def sequential(**factory: Any) -> nn.Sequential:
    """Return a host with a pool, a strided convolution, a norm with statistics and a dropout."""
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, **factory)
    return nn.Sequential(conv, nn.BatchNorm2d(8, **factory), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2))


def images(*size: int, **factory: Any) -> Tensor:
    return torch.randn(*(size or (2, 3, 16, 16)), **factory)


def count(model: nn.Module, *kinds: type) -> int:
    return sum(type(module) in kinds for module in model.modules())
