"""Batch norms over edges, in every state of torch's batch norm, and instance norm over nodes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from paper_layers.deep_gcn import EdgeConv, Perceptron
from tests.ops.test_neighbor_reduce import features, table


def without(norm: Any, *names: str) -> None:
    for name in names:
        setattr(norm, name, None)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "change",
    [
        lambda norm: setattr(norm, "track_running_stats", False),
        lambda norm: without(norm, "bias"),
        lambda norm: without(norm, "weight"),
        lambda norm: without(norm, "weight", "bias"),
        lambda norm: without(norm, "num_batches_tracked"),
    ],
    ids=["frozen statistics", "no bias", "no weight", "no parameters", "no counter"],
)
def test_norms_that_lack_a_part_compute_as_torch_does(change: Any, momentum: float | None) -> None:
    conv, x, index = EdgeConv(4, 3), features(9, 4), table(9, 3, rows=9)
    norm: Any = conv.nn.norm
    norm.momentum = momentum
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    change(norm)
    twin = copy.deepcopy(conv)
    twin.nn.norm.register_forward_hook(lambda *_: None)  # The hook forces a call.
    for training in (True, True, False):
        a, b = (each.train(training)(x, index) for each in (conv, twin))
        assert_close(a, b)
    a.sum().backward()
    b.sum().backward()
    assert_close(conv.state_dict(), twin.state_dict())
    assert_close(conv.nn.linear.weight.grad, twin.nn.linear.weight.grad)


def test_instance_norm_of_ragged_clouds_compiles_and_exports() -> None:
    layer, x, ptr = Perceptron(4, 3, norm="instance"), features(9, 4), torch.tensor([0, 4, 4, 9])
    expected = torch.cat([layer(x[None, :4])[0], layer(x[None, 4:])[0]])
    assert_close(layer(x, ptr=ptr), expected)
    assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x, ptr=ptr), expected)
    assert_close(torch.export.export(layer, (x,), {"ptr": ptr}).module()(x, ptr=ptr), expected)
    with pytest.raises(ValueError, match="x: expected more than one value to normalise each channel with, got 1"):
        layer(x, ptr=torch.tensor([0, 8, 9]))
