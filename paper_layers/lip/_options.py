"""The options of the published networks."""

from __future__ import annotations

from typing import TypedDict

import torch


class NetworkOptions(TypedDict, total=False):
    """See `LIPResNet` and `LIPDenseNet`."""

    num_classes: int
    hidden_channels: int
    zero_init: str | None
    device: torch.device | str | None
    dtype: torch.dtype | None
