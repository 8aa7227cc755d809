"""Options that `LazyLIPPool2d` and the published networks pass on."""

from __future__ import annotations

from typing import TypedDict

import torch

from paper_layers.lip.pool import Logit


class _Options(TypedDict, total=False):
    hidden_channels: int
    zero_init: str | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class PoolOptions(_Options, total=False):
    """See `LIPPool2d`."""

    logit: Logit
    ceil_mode: bool


class NetworkOptions(_Options, total=False):
    """See `LIPResNet` and `LIPDenseNet`."""

    num_classes: int
