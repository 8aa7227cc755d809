"""Distinct and merged centers against a search over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from paper_layers.soft_triple import _merging


def walk(centers: Tensor, threshold: float) -> tuple[list[int], list[np.ndarray], list[int]]:
    """Find each class's groups by depth-first search in float64."""
    counts: list[int] = []
    merged: list[np.ndarray] = []
    classes: list[int] = []
    for c, rows in enumerate(centers.double().numpy()):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        left, count = list(range(len(unit))), 0
        while left:
            group, border = [], [left.pop(0)]
            while border:
                group.append(at := border.pop())
                close = [j for j in left if np.linalg.norm(unit[at] - unit[j]) < threshold]
                left = [j for j in left if j not in close]
                border += close
            mean = unit[group].sum(0)
            merged.append(mean / np.linalg.norm(mean))
            classes.append(c)
            count += 1
        counts.append(count)
    return counts, merged, classes


@pytest.mark.parametrize(("classes", "k"), [(7, 1), (6, 2), (9, 5), (3, 17)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_merging(classes: int, k: int, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_merging, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(k)
    centers = torch.randn(classes, k, 3, generator=generator).to(dtype) * 5
    for threshold in (0.3, 0.6):
        counts, merged, owners = walk(centers, threshold)
        assert _merging.distinct_centers(centers, threshold).tolist() == counts
        ours, ours_owners = _merging.merge_centers(centers, threshold)
        assert ours.dtype == dtype
        assert ours_owners.tolist() == owners
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(ours.double(), torch.tensor(np.array(merged)), rtol=0, atol=tolerance)


def test_chain_is_one_group() -> None:
    """Neighbours are close, the ends are far apart, and the centers are shuffled."""
    for k in (3, 8, 9):
        angle = 0.1 * torch.arange(k)[torch.randperm(k)]
        chain = torch.stack([angle.cos(), angle.sin()], 1)[None]
        assert _merging.distinct_centers(chain, 0.11).tolist() == [1]
        assert _merging.distinct_centers(chain, 0.09).tolist() == [k]


def test_what_is_close_is_not_lost() -> None:
    """In float32, matrix products would lose these distances."""
    pair = torch.tensor([[1.0, 0.0], [1.0, 1e-4]])
    centers = torch.stack([pair, pair[[0, 0]], 7 * pair])
    assert _merging.distinct_centers(centers, 0.9e-4).tolist() == [2, 1, 2]
    assert _merging.distinct_centers(centers, 1.1e-4).tolist() == [1, 1, 1]


def test_no_class_and_wrong_thresholds() -> None:
    none = torch.empty(0, 3, 4)
    assert _merging.distinct_centers(none, 0.1).shape == (0,)
    merged, classes = _merging.merge_centers(none, 0.1)
    assert (merged.shape, classes.shape, classes.dtype) == ((0, 4), (0,), torch.int64)
    with pytest.raises(ValueError, match="threshold: expected more than 0, got 0"):
        _merging.distinct_centers(none, 0)
    with pytest.raises(TypeError, match="threshold: expected a number, got None"):
        _merging.merge_centers(none, None)
