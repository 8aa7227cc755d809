"""Find a class's merged centers, and replace each group by one center."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers._core import checks

_CHUNK = 1 << 22  # Elements in the largest temporary tensor.


def distinct_centers(centers: Tensor, threshold: float) -> Tensor:
    """Count each class's centers (C, K, d), with centers closer than `threshold` as one: int64 of shape (C,)."""
    counts = [_is_first(group).sum(1) for _, group in _groups(centers, threshold)]
    return torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64, device=centers.device)


def merge_centers(centers: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Merge each class's centers (C, K, d) closer than `threshold`: unit vectors (M, d) and their classes (M,)."""
    merged, classes = [centers.new_zeros(0, centers.shape[-1])], []
    start = 0
    for unit, group in _groups(centers, threshold):
        sums = torch.zeros_like(unit).scatter_add_(1, group[..., None].expand_as(unit), unit)
        kept = _is_first(group)
        merged.append(F.normalize(sums[kept], dim=-1).to(centers.dtype))
        classes.append(start + kept.nonzero()[:, 0])
        start += len(unit)
    return torch.cat(merged), torch.cat(classes) if classes else distinct_centers(centers, threshold)


def _is_first(group: Tensor) -> Tensor:
    """Return a mask of the first center in each group."""
    return group == torch.arange(group.shape[1], device=group.device)


def _groups(centers: Tensor, threshold: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of unit centers (c, K, d), and the first center (c, K) that each is connected to."""
    threshold = checks.number("threshold", threshold)
    if not threshold > 0:
        raise ValueError(f"threshold: expected more than 0, got {threshold!r}")
    k = centers.shape[1]
    dtype = torch.float64 if centers.dtype == torch.float64 else torch.float32
    for part in centers.detach().split(max(1, _CHUNK // (k * max(k, centers.shape[2])))):
        unit = F.normalize(part.to(dtype), dim=-1)
        # Without matrix products, which lose small distances.
        near = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist") < threshold
        near = (near | torch.eye(k, dtype=torch.bool, device=near.device)).to(dtype)
        length = 1
        while length < k - 1:  # `near` holds paths of up to `length` pairs.
            near, length = ((near @ near) > 0).to(dtype), 2 * length
        yield unit, near.argmax(-1)
