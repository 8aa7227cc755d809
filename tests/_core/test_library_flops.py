"""Profilers and trainers count the products inside the ops."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import paper_layers
from paper_layers.big_bigan import SpectralLinear


def test_soft_triple() -> None:
    loss, x = paper_layers.SoftTripleLoss(7, 16, 3), torch.randn(5, 16, requires_grad=True)
    scores, of_centers = 2 * 5 * 7 * 3 * 16, 2 * 7 * 3 * 3 * 16
    with FlopCounterMode(display=False) as counter:
        value = loss(x, torch.arange(5))
    assert counter.get_total_flops() == scores + of_centers
    with FlopCounterMode(display=False) as counter:
        value.backward()
    assert counter.get_total_flops() == 3 * scores + of_centers
    with FlopCounterMode(display=False) as counter:
        loss.get_logits(x).sum().backward()
    assert counter.get_total_flops() == 4 * scores


def test_spectral_linear() -> None:
    counts = []
    for layer in (nn.Linear(6, 4), SpectralLinear(6, 4)):
        x = torch.randn(5, 6, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 5 * 6 * 4


def test_knn_counts_all_pairs_of_a_cloud() -> None:
    x = torch.randn(2, 10, 3)
    for call in (
        lambda: paper_layers.knn(x, k=2),
        lambda: paper_layers.knn(x.flatten(0, 1), k=2, ptr=torch.tensor([0, 10, 20])),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == 2 * 2 * 10 * 10 * 3
