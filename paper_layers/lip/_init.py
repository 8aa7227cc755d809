"""The init that LIP's host networks share."""

from __future__ import annotations

from typing import Literal

from torch import nn

from paper_layers.lip._norm import InstanceNorm2d
from paper_layers.lip.logit import LogitHead


def init_host(root: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """Initialize all convolutions and norms under `root`. Its LIP pools still start as average pooling."""
    for module in root.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | InstanceNorm2d):
            module.reset_parameters()
    for module in root.modules():
        if isinstance(module, LogitHead):
            module.reset_zeros()
