"""Bounds on dispatched ops: on a GPU they decide small layers, and they are the same on any machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import paper_layers
from testing.counting import dispatched_ops


def image() -> Tensor:
    return torch.randn(4, 6, 8, 8, requires_grad=True)


def loss_layer() -> tuple[Callable[[], Tensor], list[Tensor]]:
    loss, embeddings = paper_layers.SoftTripleLoss(10, 16, 3), torch.randn(8, 16, requires_grad=True)
    return lambda: loss(embeddings, torch.arange(8)), [embeddings, loss.centers]


def pool() -> tuple[Callable[[], Tensor], list[Tensor]]:
    x = image()
    return lambda: paper_layers.lip_pool2d(x, x, 3, 2, 1).sum(), [x]


def points() -> tuple[Callable[[], Tensor], list[Tensor]]:
    x, where = image(), torch.rand(4, 5, 2)
    return lambda: paper_layers.point_sample(x, where).sum(), [x]


# Ops of forward and backward, with those of the test's own: a sum and its gradient, or labels.
@pytest.mark.parametrize(("layer", "most"), [(loss_layer, 16), (pool, 8), (points, 8)])
def test_few_ops(layer: Callable[[], Any], most: int) -> None:
    run, leaves = layer()
    names = dispatched_ops(lambda: torch.autograd.grad(run(), leaves))
    assert len(names) <= most, names
