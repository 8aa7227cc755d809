"""From what an image network gives to one row of features an image."""

from __future__ import annotations

from torch import Tensor

from paper_layers._core import checks

POOLS = ("sum", "average")


def pooled(name: str, features: Tensor, pool: str, size: int, size_name: str) -> Tensor:
    """Rows (N, size) of features (N, size), or the sum or average over places of (N, size, H, W) or (N, T, size)."""
    checks.floating(name, features)
    places = {2: (), 3: (1,), 4: (2, 3)}.get(features.dim())
    channels = 2 if features.dim() == 3 else 1
    if places is None or features.shape[channels] != size:
        expected = f"({size_name}={size}) (N, {size}), (N, {size}, H, W) or (N, T, {size})"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(features.shape)}")
    if not places:
        return features
    return features.sum(places) if pool == "sum" else features.mean(places)
