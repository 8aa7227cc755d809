"""Load official checkpoints: whole models, single heads, old names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from paper_layers.point_rend import CoarseMaskHead, PointRendHead, PointRendMask, PointRendSemantic, load_official
from testing.official import point_rend as official

POINT = official.randomize(official.PointHead(6, 4, 8)).state_dict()
COARSE = official.randomize(official.CoarseHead(6, 4, 4, 8), seed=1).state_dict()
HOST = {"backbone.stem.fc1.weight": torch.ones(2), "roi_heads.box_head.fc1.weight": torch.ones(3, 3)}
HOST |= {"sem_seg_head.coarse.predictor.weight": torch.ones(1), "roi_heads.mask_head.mask_fcn1.weight": torch.ones(1)}


def placed(point: str, coarse: str = "") -> dict[str, Tensor]:
    state = {f"{point}.{key}": value for key, value in POINT.items()}
    return {**state, **({f"{coarse}.{key}": value for key, value in COARSE.items()} if coarse else {}), **HOST}


def mask_module() -> PointRendMask:
    return PointRendMask(6, 4, hidden_features=8, coarse_hidden_channels=4, coarse_hidden_features=8)


def check_point(head: PointRendHead) -> None:
    for number in range(3):
        assert torch.equal(head.layers[number].weight, POINT[f"fc{number + 1}.weight"][..., 0])
        assert torch.equal(head.layers[number].bias, POINT[f"fc{number + 1}.bias"])
    assert torch.equal(head.predictor.weight, POINT["predictor.weight"][..., 0])
    assert torch.equal(head.predictor.bias, POINT["predictor.bias"])


def check_coarse(head: CoarseMaskHead) -> None:
    names = {"reduce_channel_dim_conv": "reduce_channels", "reduce_spatial_dim_conv": "reduce_size"}
    for key, value in COARSE.items():
        name, kind = key.split(".")
        assert torch.equal(head.get_submodule(names.get(name, name)).get_parameter(kind), value), key


def test_whole_models(tmp_path: Path) -> None:
    """COCO's, Cityscapes' and semantic models, with current and old keys."""
    state = placed("roi_heads.mask_head.point_head", "roi_heads.mask_head.coarse_head")
    old = placed("roi_heads.mask_point_head", "roi_heads.mask_coarse_head")
    old = {key.replace("coarse_head.fc", "coarse_head.coarse_mask_fc"): value for key, value in old.items()}
    torch.save({"model": state, "iteration": 3}, tmp_path / "model.pth")
    parallel = {f"module.{key}": value for key, value in state.items()}
    for form in (state, old, {"model": state}, {"state_dict": parallel}, tmp_path / "model.pth"):
        ours = load_official(mask_module(), form)
        check_point(ours.point_head)
        check_coarse(ours.coarse_head)
    check_point(load_official(PointRendHead(6, 4, hidden_features=8), state))
    check_coarse(load_official(CoarseMaskHead(6, 4, hidden_channels=4, hidden_features=8), old))
    semantic = PointRendSemantic(6, 4, hidden_features=8, coarse_pred_each_layer=True)
    check_point(load_official(semantic, placed("sem_seg_head.point_head")).point_head)


def test_single_heads() -> None:
    check_point(load_official(PointRendHead(6, 4, hidden_features=8), POINT))
    check_coarse(load_official(CoarseMaskHead(6, 4, hidden_channels=4, hidden_features=8), COARSE))
    renamed = {key.replace("fc", "coarse_mask_fc"): value for key, value in COARSE.items()}
    check_coarse(load_official(CoarseMaskHead(6, 4, hidden_channels=4, hidden_features=8), renamed))


def test_nothing_is_loaded_unless_all_fits() -> None:
    state = placed("m.point_head", "m.coarse_head")
    ours = mask_module()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    lacking = {key: value for key, value in state.items() if key != "m.point_head.fc2.bias"}
    for wrong, message in (
        (lacking, "missing point_head.layers.1.bias"),
        ({**state, "m.point_head.fc4.weight": torch.ones(1)}, "unexpected m.point_head.fc4.weight"),
        ({**state, "m.coarse_head.fc9.weight": torch.ones(1)}, "unexpected m.coarse_head.fc9.weight"),
        ({**state, "m.point_head.fc1.weight": torch.ones(8, 9, 1)}, r"m.point_head.fc1.weight of shape \(8, 9, 1\)"),
        (POINT, "missing point_head.layers.0.weight"),
        ({}, "missing"),
    ):
        with pytest.raises(ValueError, match=message):
            load_official(ours, wrong)
    with pytest.raises(TypeError, match="state_dict: expected a mapping or a path, got int"):
        load_official(ours, 3)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name])
