"""Pool an image network's output to one feature vector per image."""

from __future__ import annotations

from torch import Tensor

from paper_layers._core import checks

POOLS = ("sum", "mean")


def pooled(name: str, features: Tensor, pool: str, channels: int) -> Tensor:
    """Pool features (N, C), (N, C, H, W) or (N, T, C) over their positions to (N, C)."""
    checks.floating(name, features)
    checks.shape(name, features, ("N", channels), ("N", channels, "H", "W"), ("N", "T", channels))
    if features.dim() == 2:
        return features
    positions = (1,) if features.dim() == 3 else (2, 3)
    return features.sum(positions) if pool == "sum" else features.mean(positions)
