"""Parameter groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paper_layers.soft_triple import SoftTripleLoss, param_groups


def test_network_and_centers() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    losses = [SoftTripleLoss(5, 4, 2), SoftTripleLoss(2, 4, 1)]
    inside = nn.ModuleDict({"net": net, "one": losses[0], "two": losses[1]})
    beside_others = nn.ModuleList([nn.PReLU(), losses[1]])
    for modules, extra in (((net, *losses), 0), ((inside,), 0), ((net, losses[0], beside_others, inside), 1)):
        others, centers = param_groups(*modules, lr=0.1, center_lr=2)
        assert (others["lr"], centers["lr"]) == (0.1, 2)
        assert [id(p) for p in centers["params"]] == [id(loss.centers) for loss in losses]
        assert len(others["params"]) == len(list(net.parameters())) + extra
        assert {id(p) for p in net.parameters()} <= {id(p) for p in others["params"]}


def test_a_step_moves_each_at_its_rate() -> None:
    torch.manual_seed(0)
    net, loss = nn.Linear(3, 4), SoftTripleLoss(5, 4, 2)
    optimizer = torch.optim.SGD(param_groups(net, loss, lr=0.5, center_lr=3))
    loss(net(torch.randn(6, 3)), torch.arange(6) % 5).backward()
    expected = [(p - rate * p.grad).clone() for p, rate in ((net.weight, 0.5), (loss.centers, 3))]
    optimizer.step()
    torch.testing.assert_close([net.weight, loss.centers], expected)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="modules: expected a SoftTripleLoss among them, got Linear"):
        param_groups(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="got none"):
        param_groups()
    with pytest.raises(TypeError, match="center_lr: expected a number, got '1'"):
        param_groups(SoftTripleLoss(1, 1), center_lr="1")
