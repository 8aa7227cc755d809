"""LIPPool2d as timm's anti-aliasing layer."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
from timm import create_model
# isort: on

from paper_layers.lip import LIPPool2d


class ProjectionPool(LIPPool2d):
    """timm's ResNet takes a class, not a partial, so another form of logit needs a subclass."""

    def __init__(self, channels: int, stride: int = 2, **factory: Any):
        super().__init__(channels, stride=stride, logit="projection", **factory)


@pytest.mark.parametrize(
    ("name", "layer", "form"),
    [
        ("resnet50", LIPPool2d, "bottleneck"),
        ("resnet18", ProjectionPool, "projection"),
        ("efficientnet_b0", functools.partial(LIPPool2d, logit="projection"), "projection"),
    ],
)
def test_aa_layer(name: str, layer: Any, form: str) -> None:
    model: nn.Module = create_model(name, aa_layer=layer, num_classes=5)
    pools = [module for module in model.modules() if isinstance(module, LIPPool2d)]
    assert len(pools) == 4
    assert all(pool.form == form and pool.stride == 2 for pool in pools)
    # timm's init changed all convolutions, but the pools must still be average pools.
    for pool in pools:
        x = torch.randn(1, pool.channels, 8, 8)
        torch.testing.assert_close(pool(x), nn.functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False))
    assert model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 5)
