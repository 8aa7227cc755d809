"""Options that `SoftTripleLoss` documents, and its subclass for several processes passes on."""

from __future__ import annotations

from typing import TypedDict

import torch


class LossOptions(TypedDict, total=False):
    """Options of `SoftTripleLoss`."""

    la: float
    gamma: float
    tau: float
    margin: float
    ignore_index: int
    reduction: str
    chunk_size: int | None
    dtype: torch.dtype | None
