"""Arguments of the swap, and hosts that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
# isort: on

from torchvision.models import segmentation

from paper_layers import swap
from paper_layers.lip import LIPPool2d
from tests.point_rend.test_swap import CLASSES, FEW, NAMES, Net, images, labels, net


def test_idempotent() -> None:
    model = net()
    modules = list(model.modules())
    assert swap.point_rend(model) is model
    assert swap.point_rend(model, **NAMES) is model
    assert list(model.modules()) == modules
    assert len(model.head._forward_hooks) == 1


@pytest.mark.parametrize("first", [True, False])
def test_with_lip(first: bool) -> None:
    model = Net()
    if first:
        swap.strided_conv(swap.pooling(model))
    swap.point_rend(model, **NAMES, **FEW)
    if not first:
        swap.strided_conv(swap.pooling(model))
    assert type(model.body[0]) is LIPPool2d
    assert model(images()).shape == (2, CLASSES, 32, 48)


def lraspp() -> nn.Module:
    return segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)


def test_inner_hosts_and_filter() -> None:
    model: Any = nn.ModuleDict({"a": lraspp(), "b": lraspp(), "net": Net()})
    swap.point_rend(model, filter_fn=lambda module, name: name == "b", **FEW)
    assert [hasattr(model[key], "point_rend") for key in model] == [False, True, False]
    swap.point_rend(model)
    assert [hasattr(model[key], "point_rend") for key in model] == [True, True, False]
    swap.point_rend(model["net"], **NAMES)
    assert model["net"](images()).shape == (2, CLASSES, 32, 48)


def test_fine_of_torchvision() -> None:
    model: Any = swap.point_rend(lraspp(), fine=["backbone.1", "backbone.3"])
    assert model.point_rend.point_head.in_channels == 16 + 24


def test_example_input() -> None:
    model: Any = swap.point_rend(Net(), **NAMES, example_input=(images(), 2.0))
    assert model.point_rend.point_head.in_channels == 8 + 12


class Two(Net):
    def forward(self, image: Tensor) -> Any:
        return super().forward(image), image


class Same(Net):
    def forward(self, image: Tensor) -> Any:
        return self.head(self.body(self.stem(image)))


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (Net, {}, ValueError, r"at least one torchvision FCN, DeepLabV3, LRASPP or Mask R-CNN .*got none in Net"),
        (Net, {"coarse": "head"}, ValueError, r"fine: expected names of modules in Net, got None"),
        (Net, {"coarse": "head", "fine": []}, ValueError, r"fine: expected names of modules in Net, got \[\]"),
        (Net, {"coarse": "had", "fine": "stem"}, ValueError, r"coarse: .*\(it has stem, body, head\), got 'had'"),
        (Net, {"coarse": "head", "fine": "stem.9"}, ValueError, r"fine: expected the name of a module.*got 'stem\.9'"),
        (Net, {"coarse": "head", "fine": ""}, ValueError, r"fine: expected the name of a module.*got ''"),
        (Net, {"coarse": "head", "fine": [3]}, TypeError, r"fine: expected the name of a module, got 3"),
        (Net, {"coarse": "body", "fine": "stem"}, ValueError, r"coarse: expected 5 channels.*got 12"),
        (Two, NAMES, ValueError, r"the output of Two: expected a map.*got tuple"),
        (Same, NAMES, ValueError, r"coarse: expected a map smaller than .*\(28, 28\), got \(28, 28\)"),
        (Net, {**NAMES, "example_input": torch.zeros(2, 4, 9, 9)}, ValueError, r"example_input: .*Net.*RuntimeError"),
        (Net, {**NAMES, "points": 3}, TypeError, r"unexpected keyword argument 'points'"),
        (Net, {**NAMES, "num_points": 0}, ValueError, r"num_points: expected at least 1, got 0"),
        (Net, {**NAMES, "filter_fn": lambda module, name: False}, ValueError, r"filter_fn accepts \(1 without it\)"),
        (str, {}, TypeError, r"model: expected a Module, got str"),
    ],
)
def test_bad_input(kind: Any, arguments: dict[str, Any], error: type, message: str) -> None:
    model = kind()
    with pytest.raises(error, match=message):
        swap.point_rend(model, **arguments)
    assert type(model) is kind
    assert not hasattr(model, "point_rend")
    if kind is not str:
        assert not any(module._forward_hooks for module in model.modules())


def test_output_that_is_no_map() -> None:
    model = Net()
    model.body = nn.Sequential(model.body, nn.Flatten(2), nn.Unflatten(2, (14, 56)))
    with pytest.raises(ValueError, match=r"fine: expected a map \(N, C, H, W\).*float32 of shape \(2, 12, 784\)"):
        swap.point_rend(model, fine="body.1", coarse="head")
    model.unused = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match=r"fine: expected a map \(N, C, H, W\).*NoneType"):
        swap.point_rend(model, fine="unused", coarse="head")


def test_no_stage_of_stride_four() -> None:
    model: Any = lraspp()
    model.backbone.pop("2")
    model.backbone["3"] = nn.Conv2d(16, 24, 1, stride=4)
    with pytest.raises(ValueError, match=r"fine: .* nothing of stride 4, got None"):
        swap.point_rend(model)


def test_forward_on_the_object() -> None:
    model = Net()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="model: expected the forward of its class"):
        swap.point_rend(model, **NAMES)


def test_target_of_the_wrong_dtype() -> None:
    model = net()
    with pytest.raises(TypeError, match="labels: expected an int64 Tensor"):
        model(images(), target=labels().float())
