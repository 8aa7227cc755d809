"""Bounds on the ops that forward and backward dispatch: on a GPU they decide how long small layers take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paper_layers import edge_conv, neighbor_reduce
from paper_layers.deep_gcn import EdgeConv, GINConv, MRConv, ResGCNBlock, SAGEConv
from testing.counting import dispatched_ops
from tests.ops.test_neighbor_reduce import features, table

X, INDEX = features(2, 8, 4), table(2, 8, 3, rows=8)

LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "EdgeConv": (lambda: EdgeConv(4, 4), 25),
    "EdgeConv without norm": (lambda: EdgeConv(4, 4, norm=None), 27),
    "EdgeConv, norm before PReLU": (lambda: EdgeConv(4, 4, act="prelu", order="norm_act"), 57),
    "MRConv": (lambda: MRConv(4, 4), 31),
    "GINConv": (lambda: GINConv(4, 4), 33),
    "SAGEConv": (lambda: SAGEConv(4, 4), 49),
    "SAGEConv of means": (lambda: SAGEConv(4, 4, reduction="mean"), 73),
}


def trained(layer: nn.Module, *arguments: Tensor) -> Callable[[], Any]:
    x = X.clone().requires_grad_()
    leaves, grad = (x, *layer.parameters()), torch.ones_like(layer(x, *arguments))
    return lambda: torch.autograd.grad(layer(x, *arguments), leaves, grad)


@pytest.mark.parametrize("name", LAYERS)
def test_training_a_convolution(name: str) -> None:
    make, most = LAYERS[name]
    found = dispatched_ops(trained(make(), INDEX))
    assert len(found) <= most, found


def test_training_a_block() -> None:
    found = dispatched_ops(trained(ResGCNBlock(4, k=3)))
    assert len(found) <= 30, found


@pytest.mark.parametrize("make", [EdgeConv, MRConv, GINConv, SAGEConv])
def test_inference(make: Any) -> None:
    layer = make(4, 4).eval()
    with torch.no_grad():
        found = dispatched_ops(lambda: layer(X, INDEX))
    assert len(found) <= {EdgeConv: 8}.get(make, 16), found


@pytest.mark.parametrize("function", [lambda: neighbor_reduce(X, INDEX), lambda: edge_conv(X, X, INDEX)])
def test_ops_without_gradient(function: Callable[[], Any]) -> None:
    assert len(dispatched_ops(function)) == 1
