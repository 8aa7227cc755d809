"""Attributes of the user's on layers that a surgery changes: kept, or refused where the new layer needs the name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
import torch_geometric.nn as pyg
import torchvision
# isort: on

from paper_layers import adv_prop, swap


class Segmenter(nn.Module):
    """Names of its own that are none of ours."""

    prefix, arguments = "net.", ("size",)

    def __init__(self) -> None:
        super().__init__()
        self.added = 1
        self.fine, self.coarse = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 2, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert (self.prefix, self.arguments, self.added) == ("net.", ("size",), 1)
        return nn.functional.interpolate(self.coarse(self.fine(x)), x.shape[2:])


def convolution() -> nn.Module:
    conv = object.__new__(pyg.DynamicEdgeConv)  # PyG builds one only beside another package.
    pyg.MessagePassing.__init__(conv, aggr="max")
    conv.nn, conv.k, conv.num_workers = nn.Linear(6, 4), 2, 1
    return nn.Sequential(conv)


def pools() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.MaxPool2d(2))


def mask_rcnn() -> nn.Module:
    return torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)


CASES: dict[str, tuple[Callable[[], nn.Module], str, Callable[[nn.Module], nn.Module], str]] = {
    "pooling": (pools, "1", lambda m: swap.pooling(m, "projection"), "channels logit form importance zero_init"),
    "strided_conv": (pools, "0", lambda m: swap.strided_conv(m, "projection"), "pool take_stride"),
    "split_batch_norm": (
        lambda: nn.Sequential(nn.BatchNorm2d(4)),
        "0",
        swap.split_batch_norm,
        "num_splits split_sizes split_norms sizes _split",
    ),
    "graph_conv": (convolution, "0", swap.graph_conv, "_split _terms"),
    "point_rend": (
        Segmenter,
        "",
        lambda m: swap.point_rend(m, fine="fine", coarse="coarse", num_points=4),
        "point_rend _point_rend_taps",
    ),
    "masks": (mask_rcnn, "roi_heads", swap.point_rend, "point_rend"),
    "big_bigan": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 1)),
        "",
        lambda m: swap.big_bigan(m, 3, hidden_features=4, depth=2),
        "big_bigan _big_bigan_pool",
    ),
}
KINDS: dict[str, Callable[[], Any]] = {
    "attribute": lambda: 7,
    "parameter": lambda: nn.Parameter(torch.ones(1)),
    "module": nn.Identity,
}


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in CASES[case][-1].split()])
@pytest.mark.parametrize("kind", KINDS)
def test_names_that_a_new_layer_needs_are_refused(case: str, name: str, kind: str) -> None:
    build, path, change, _ = CASES[case]
    model = build()
    layer, value = model.get_submodule(path), KINDS[kind]()
    setattr(layer, name, value) if kind != "attribute" else vars(layer).update({name: value})
    before, text = type(layer), str(model)
    with pytest.raises(ValueError, match=f"expected no attribute '{name}' beside"):
        change(model)
    assert (type(layer), str(model)) == (before, text)
    assert getattr(layer, name) is value


@pytest.mark.parametrize("case", CASES)
def test_all_others_stay(case: str) -> None:
    build, path, change, _ = CASES[case]
    model = build()
    layer: Any = model.get_submodule(path)
    layer.mine, layer.prefix, layer._name = 7, "net.", "here"
    layer.added, layer.arguments, layer.note = 1, ("size",), nn.Identity()
    note = layer.note
    change(model)
    kept = (layer.mine, layer.prefix, layer._name, layer.added, layer.arguments, layer.note)
    assert kept == (7, "net.", "here", 1, ("size",), note)
    if case == "point_rend":
        assert model(torch.randn(1, 3, 16, 16)).shape == (1, 2, 16, 16)
    elif case == "big_bigan":
        model = change(CASES[case][0]())
        vars(model).update(added="Flatten", prefix=1)
        assert model(torch.randn(2, 3, 8, 8), torch.randn(2, 3)).x.shape == (2,)


def test_masks_with_methods_of_their_own() -> None:
    model = mask_rcnn()
    model.roi_heads.check_targets = lambda targets: None
    with pytest.raises(ValueError, match="roi_heads: expected the check_targets of its class"):
        swap.point_rend(model)


def test_plain_norms_can_be_split_again() -> None:
    norm = nn.BatchNorm2d(3)
    norm._name = "here"
    before = copy.deepcopy(vars(norm))
    swap.split_batch_norm(norm)
    with adv_prop.use_split(norm, 1):
        pass
    swap.plain_batch_norm(norm)
    assert vars(norm).keys() == before.keys()
    assert swap.split_batch_norm(norm)._name == "here"
