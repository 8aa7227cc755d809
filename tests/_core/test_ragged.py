"""Starts of clouds wait for the device once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paper_layers import knn
from paper_layers._core.ragged import all_batch_starts, batch_starts

BATCH = torch.tensor([0, 0, 2, 2, 2])


def test_starts_of_several_batches_count_the_same_clouds() -> None:
    rows = torch.zeros(5, 1)
    starts = all_batch_starts(("batch", BATCH, rows), ("other", BATCH + 1, rows), ("none", BATCH[:0], rows[:0]))
    assert [s.tolist() for s in starts] == [[0, 2, 2, 5, 5], [0, 0, 2, 2, 5], [0, 0, 0, 0, 0]]
    assert batch_starts("batch", BATCH[:0], rows[:0]).tolist() == [0]


@pytest.mark.parametrize("wrong", [BATCH.flip(0), BATCH - 1])
def test_the_wrong_batch_is_named(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="other: expected numbers from 0 in ascending order"):
        all_batch_starts(("batch", BATCH, BATCH), ("other", wrong, BATCH))


def test_knn_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    def count(name: str) -> None:
        read = getattr(Tensor, name)

        def counted(tensor: Tensor) -> Any:
            waits.append(name)
            return read(tensor)

        monkeypatch.setattr(Tensor, name, counted)

    for name in ("item", "tolist", "__int__", "__bool__"):
        count(name)
    x = torch.randn(5, 3)
    knn(x, k=2, batch=BATCH)
    assert len(waits) == 1
    knn(x, x[1:], k=2, batch=BATCH, points_batch=BATCH[1:])
    assert len(waits) == 2
