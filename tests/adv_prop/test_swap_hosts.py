"""Splitting the batch norms of torchvision's and timm's models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
import timm
import torchvision
# isort: on

from paper_layers import SplitBatchNorm, SplitBatchNorm2d, swap
from paper_layers.adv_prop import pgd, use_split
from tests.adv_prop.test_norm import trained

HOSTS: dict[str, Callable[[], nn.Module]] = {
    "torchvision-resnet18": torchvision.models.resnet18,
    "timm-resnet": lambda: timm.create_model("test_resnet"),
    "timm-efficientnet": lambda: timm.create_model("test_efficientnet"),
}


@pytest.mark.parametrize("host", HOSTS)
def test_hosts(host: str) -> None:
    """The split network equals two plain networks with their own norms, one per half."""
    model = HOSTS[host]().double()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        trained(norm)
    main, auxiliary = copy.deepcopy(model), copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    assert swap.split_batch_norm(model) is model
    assert [m for m in model.modules() if isinstance(m, SplitBatchNorm)] == norms
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())

    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    output = model(x)
    expected = torch.cat([main(x[:4]), auxiliary(x[4:])])
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    for name, p in model.named_parameters():
        if "aux_bn.0." in name:
            assert p.grad is not None
            torch.testing.assert_close(p.grad, auxiliary.get_parameter(name.replace("aux_bn.0.", "")).grad)
        elif f"{name.rpartition('.')[0]}.aux_bn.0.weight" in dict(model.named_parameters()):
            torch.testing.assert_close(p.grad, main.get_parameter(name).grad)
        else:
            torch.testing.assert_close(p.grad, main.get_parameter(name).grad + auxiliary.get_parameter(name).grad)
    before = copy.deepcopy(model.state_dict())
    pgd(model, torch.rand(2, 3, 32, 32).double(), torch.tensor([1, 2]), steps=1, bounds=(0, 1))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model.eval()
    with torch.no_grad():
        for number, plain in enumerate((main, auxiliary)):
            with use_split(model, number):
                torch.testing.assert_close(model(x), plain.eval()(x))
        torch.testing.assert_close(model(x[:1]), main(x[:1]))
        swap.plain_batch_norm(model, 1)
        torch.testing.assert_close(model(x), auxiliary(x))
    assert list(map(type, model.modules())) == list(map(type, auxiliary.modules()))
    assert list(model.state_dict()) == list(auxiliary.state_dict())


def test_large_host_on_meta() -> None:
    with torch.device("meta"):
        model = swap.split_batch_norm(torchvision.models.efficientnet_b0(), 4)
        assert sum(isinstance(m, SplitBatchNorm2d) for m in model.modules()) == 49
        assert model(torch.randn(8, 3, 64, 64)).shape == (8, 1000)
