"""Mask R-CNN of torchvision with the masks of PointRend."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
import torchvision
# isort: on

from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import paste_masks_in_image

from paper_layers import swap
from paper_layers.point_rend import PointRendMask


def detector(num_classes: int = 4, **arguments: Any) -> Any:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    few: dict[str, Any] = {f"rpn_{when}_nms_top_n_{mode}": 40 for when in ("pre", "post") for mode in ("train", "test")}
    few |= {"min_size": 64, "max_size": 96, "box_score_thresh": 0.0, "box_detections_per_img": 7}
    return detection.MaskRCNN(backbone, num_classes, **{**few, "box_batch_size_per_image": 16, **arguments})


def scene(objects: int = 2, size: tuple[int, int] = (64, 80)) -> dict[str, Tensor]:
    corners = torch.rand(objects, 2) * 30
    boxes = torch.cat([corners, corners + 10 + torch.rand(objects, 2) * 20], 1)
    masks = torch.zeros(objects, *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y1:y2, x1 : (x1 + x2) // 2] = 1
    return {"boxes": boxes, "labels": torch.randint(1, 4, (objects,)), "masks": masks}


def pair() -> tuple[Any, Any, dict[str, Any]]:
    """Return a detector, its swapped copy, and a record of the inputs and outputs of the detector's roi_heads."""
    plain, seen = detector(), {}
    model: Any = swap.point_rend(copy.deepcopy(plain), num_points=20, subdivision_num_points=100)
    with torch.no_grad():  # Makes predictions differ between classes.
        nn.init.normal_(model.roi_heads.point_rend.coarse_head.prediction.weight)
    select = plain.roi_heads.select_training_samples

    def remember(*args: Any) -> Any:
        seen["samples"] = select(*args)
        return seen["samples"]

    plain.roi_heads.select_training_samples = remember
    # Copies, as torchvision later replaces the boxes by rescaled ones.
    plain.roi_heads.register_forward_hook(
        lambda _, args, output: seen.update(args=args, found=[dict(found) for found in output[0]])
    )
    return plain, model, seen


def test_keeps_the_rest() -> None:
    plain = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4).eval()
    old = {name: (p, p.clone()) for name, p in plain.named_parameters()}
    model = swap.point_rend(plain)
    assert model is plain
    assert type(model) is detection.MaskRCNN
    assert not any(module.training for module in model.modules())
    assert isinstance(model.roi_heads, detection.roi_heads.RoIHeads)
    new = dict(model.named_parameters())
    gone = old.keys() - new.keys()
    assert {name.split(".")[1] for name in gone} == {"mask_head", "mask_predictor"}
    assert all(new[name] is p and torch.equal(p, value) for name, (p, value) in old.items() if name not in gone)
    assert {name.split(".")[1] for name in new.keys() - old.keys()} == {"point_rend"}
    head = model.roi_heads.point_rend
    assert isinstance(head, PointRendMask)
    assert (head.coarse_head.in_channels, head.coarse_head.num_classes, head.spatial_scale) == (256, 4, 0.25)
    modules = list(model.modules())
    assert swap.point_rend(model) is model
    assert list(model.modules()) == modules


def test_inference() -> None:
    plain, model, seen = pair()
    x = [torch.rand(3, 64, 80), torch.rand(3, 50, 70)]
    with torch.no_grad():
        expected, actual = plain.eval()(x), model.eval()(x)
        found = seen["found"]
        head, features = model.roi_heads.point_rend, seen["args"][0]["0"]
        logits = head(features, [f["boxes"] for f in found], [f["labels"] for f in found], size=224)
    probabilities = logits.sigmoid().split([len(f["boxes"]) for f in found])
    assert len(logits) > 2
    for image, one, other, masks in zip(x, actual, expected, probabilities, strict=True):
        assert list(one) == list(other)
        for key in ("boxes", "labels", "scores"):
            torch.testing.assert_close(one[key], other[key])
        assert masks.shape[1:] == (1, 224, 224)
        pasted = paste_masks_in_image(masks, one["boxes"], image.shape[1:])
        torch.testing.assert_close(one["masks"], pasted)
        assert one["masks"].shape == other["masks"].shape


@pytest.mark.parametrize("objects", [(2, 3), (0, 1), (1, 0)])
def test_training(objects: tuple[int, int]) -> None:
    plain, model, seen = pair()
    x = [torch.rand(3, 64, 80), torch.rand(3, 64, 80)]
    targets = [scene(count) for count in objects]
    torch.manual_seed(1)
    expected = plain(x, targets)
    boxes, matched, classes, _ = seen["samples"]
    some = [c > 0 for c in classes]
    boxes, matched, classes = (
        [value[s] for value, s in zip(part, some, strict=True)] for part in (boxes, matched, classes)
    )
    features, _, _, resized = seen["args"]
    masks = [target["masks"] for target in resized]
    by_hand = model.roi_heads.point_rend(features["0"], boxes, classes, masks, matched=matched)
    torch.manual_seed(1)
    losses = model(x, targets)
    assert set(losses) == {*expected, "loss_mask_point"}
    for name, value in {**expected, **by_hand}.items():
        torch.testing.assert_close(losses[name], value)
    assert all(float(value.detach()) > 0 for value in by_hand.values())
    sum(losses.values()).backward()
    # Everything trains except frozen batch norms.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.roi_heads._point_rend_samples == ()


def test_without_objects() -> None:
    model = swap.point_rend(detector())
    losses = model([torch.rand(3, 64, 80)] * 2, [scene(0), scene(0)])
    assert losses["loss_mask"] == losses["loss_mask_point"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.roi_heads.point_rend.parameters())


def test_without_boxes() -> None:
    model = swap.point_rend(detector(box_score_thresh=2.0)).eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 64, 80)])
    assert found["boxes"].shape == (0, 4)
    assert found["masks"].shape == (0, 1, 64, 80)


def test_learns() -> None:
    model = swap.point_rend(detector(), num_points=50)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    x, targets = [torch.rand(3, 64, 80)], [scene(2)]
    losses = []
    for _ in range(8):
        found = model(x, targets)
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
        losses.append(float((found["loss_mask"] + found["loss_mask_point"]).detach()))
    assert min(losses[-2:]) < 0.9 * losses[0]


def test_with_keypoints() -> None:
    model = detector()
    heads: Any = model.roi_heads
    heads.keypoint_roi_pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2)
    heads.keypoint_head = detection.keypoint_rcnn.KeypointRCNNHeads(256, (16,))
    heads.keypoint_predictor = detection.keypoint_rcnn.KeypointRCNNPredictor(16, 3)
    swap.point_rend(model)
    target = scene(2)
    target["keypoints"] = torch.cat([target["boxes"].unflatten(1, (2, 2)), torch.ones(2, 2, 1)], 2)
    target["keypoints"] = torch.cat([target["keypoints"], target["keypoints"][:, :1]], 1)
    losses = model([torch.rand(3, 64, 80)], [target])
    assert {"loss_mask", "loss_mask_point", "loss_keypoint"} <= losses.keys()
    with torch.no_grad():
        (found,) = model.eval()([torch.rand(3, 64, 80)])
    assert {"masks", "keypoints"} <= found.keys()


def test_copies() -> None:
    model, x = swap.point_rend(detector()).eval(), [torch.rand(3, 64, 80)]
    with torch.no_grad():
        expected = model(x)
        for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
            torch.testing.assert_close(twin(x), expected)


def test_autocast() -> None:
    model = swap.point_rend(detector())
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([torch.rand(3, 64, 80)], [scene(2)])
        sum(losses.values()).backward()
        model.eval()([torch.rand(3, 64, 80)])
    assert all(value.isfinite() for value in losses.values())


def test_bad_input() -> None:
    model = detector()
    with pytest.raises(ValueError, match=r"fine, coarse: expected None for MaskRCNN, got '0', None"):
        swap.point_rend(model, fine="0")
    model.roi_heads.mask_predictor = nn.Identity()
    with pytest.raises(ValueError, match=r"nn\.Conv2d that tells the classes"):
        swap.point_rend(model)
    faster = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    with pytest.raises(ValueError, match="got none in FasterRCNN"):
        swap.point_rend(faster)
    model = swap.point_rend(detector())
    target = scene(1)
    del target["masks"]
    with pytest.raises(ValueError, match=r"targets\[0\]: expected a key 'masks', got boxes, labels"):
        model([torch.rand(3, 64, 80)], [target])
