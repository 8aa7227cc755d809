"""Surgery on torchvision's and timm's models."""

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

from paper_layers import swap
from paper_layers.lip import LIPConv2d, LIPPool2d
from tests.lip.surgeries import BOTH, Surgery, count, images, sequential


def averaging(model: nn.Module) -> nn.Module:
    """Replace all pools by average pools without padding, which equal fresh LIP pools."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.MaxPool2d, nn.AvgPool2d):
                average = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode, False)
                setattr(parent, name, average)
    return model


def striding(model: nn.Module) -> nn.Module:
    """Replace each convolution of stride 2 by a convolution and an average pool."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and child.stride == (2, 2):
                child.stride = (1, 1)
                setattr(parent, name, nn.Sequential(child, nn.AvgPool2d(3, 2, 1, count_include_pad=False)))
    return model


HOSTS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "torchvision-resnet18": (torchvision.models.resnet18, 1, 7),
    "torchvision-resnet50": (torchvision.models.resnet50, 1, 7),
    "torchvision-densenet121": (torchvision.models.densenet121, 4, 1),
    "timm-resnet18": (lambda: timm.create_model("resnet18"), 1, 7),
    "timm-resnet26d": (lambda: timm.create_model("resnet26d"), 4, 4),
    "sequential": (sequential, 1, 1),
}


@pytest.mark.parametrize("host", HOSTS)
@BOTH
def test_hosts(host: str, surgery: Surgery) -> None:
    build, pools, convs = HOSTS[host]
    model = build().eval()
    old = {name: (p, p.clone()) for name, p in model.named_parameters()}
    by_hand = (averaging if surgery is swap.pooling else striding)(copy.deepcopy(model))

    assert surgery(model, hidden_channels=16) is model
    if surgery is swap.pooling:
        assert count(model, LIPPool2d) == pools
        assert count(model, nn.MaxPool2d, nn.AvgPool2d) == 0
    else:
        assert count(model, LIPConv2d) == convs
        assert not any(type(m) is nn.Conv2d and max(m.stride) > 1 for m in model.modules())
    new = dict(model.named_parameters())
    assert all(new[name] is parameter and torch.equal(parameter, value) for name, (parameter, value) in old.items())

    x = images(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(x), rtol=1e-4, atol=1e-4)
    output = model.train()(x)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(new[name].grad.count_nonzero() for name in new.keys() - old.keys())


def test_detector() -> None:
    """Swap only the backbone: the meta device can't run the detector's data-dependent part."""
    build = torchvision.models.detection.maskrcnn_resnet50_fpn
    model = build(weights=None, weights_backbone=None, min_size=64, max_size=64)
    swap.pooling(model.backbone, logit="simplified", filter_fn=lambda module, name: name == "body.maxpool")
    swap.strided_conv(model.backbone, logit="projection")
    assert count(model, LIPPool2d) == 8
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    }
    loss = sum(model([torch.rand(3, 64, 64)], [target]).values())
    loss.backward()
    assert model.backbone.body.maxpool.logit.norm.weight.grad.count_nonzero()
    with torch.no_grad():
        assert set(model.eval()([torch.rand(3, 64, 64)])[0]) == {"boxes", "labels", "scores", "masks"}


def test_segmentation() -> None:
    build = torchvision.models.segmentation.deeplabv3_resnet50
    model = swap.pooling(swap.strided_conv(build(weights=None, weights_backbone=None), "projection"), "simplified")
    assert model(images(2, 3, 64, 64))["out"].shape == (2, 21, 64, 64)


def test_timm_layer() -> None:
    model = timm.create_model("resnet50", aa_layer=LIPPool2d)
    assert swap.pooling(model) is model
    assert model(images(2, 3, 64, 64)).shape == (2, 1000)
