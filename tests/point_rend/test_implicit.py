"""Implicit PointRend."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers import point_sample, uncertain_points
from paper_layers.point_rend import (
    CoarseMaskHead,
    ImplicitPointHead,
    ImplicitPointRendMask,
    PointRendMask,
    _boxes,
    load_official,
)
from paper_layers.point_rend._boxes import flatten
from testing.official import point_rend as official
from tests.point_rend.test_heads import numbers
from tests.point_rend.test_mask import CLASSES, Fixed, inputs, true_masks
from tests.point_rend.test_semantic import CLOSE, F64

MATRIX = "positional_encoding_gaussian_matrix"


class Official(nn.Module):
    """Hold both heads under the official names."""

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.point_head = official.ImplicitHead(channels, outputs, 8)
        self.parameter_head = official.ParameterHead(
            channels, (256 + channels + 8 + 8 + outputs) * 8 + 24 + outputs, 6, 10
        )


def pair(
    channels: int = 6, classes: int = CLASSES, agnostic: bool = False, **settings: Any
) -> tuple[ImplicitPointRendMask, Official]:
    theirs = official.randomize(Official(channels, 1 if agnostic else classes)).double()
    with torch.no_grad():
        for parameter in theirs.parameter_head.prediction.parameters():
            parameter.mul_(0.2)  # Makes logits about 1.
        theirs.point_head.get_buffer(MATRIX).copy_(numbers(2, 128, seed=9))
    small = {"hidden_features": 8, "parameter_hidden_channels": 6, "parameter_hidden_features": 10, "num_points": 20}
    small |= {"subdivision_num_points": 36}
    ours = ImplicitPointRendMask(channels, classes, class_agnostic=agnostic, **{**small, **settings}, dtype=F64)
    return load_official(ours, theirs.state_dict()), theirs


def box_parameters(theirs: Official, features: Tensor, boxes: list[Tensor]) -> Tensor:
    grid = official.regular_points(sum(map(len, boxes)), 14)
    return theirs.parameter_head(official.box_sample(features, boxes, grid, 0.25).unflatten(2, (14, 14)))


def test_gradients() -> None:
    head = ImplicitPointHead(2, 2, hidden_features=2, num_fc=1, dtype=F64)
    leaves = [numbers(1, 2, 2, seed=1), numbers(1, head.num_params), numbers(1, 2, 2, seed=2).sigmoid()]
    leaves = [x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(head, leaves)
    assert torch.autograd.gradgradcheck(lambda *x: head(*x).square(), leaves, fast_mode=True)
    ours, _ = pair()
    boxes, labels = [torch.tensor([[1.0, 2, 14, 12]], dtype=F64)], [torch.tensor([1])]
    masks, bias = [torch.ones(1, 16, 20)], ours.parameter_head.prediction.bias

    def losses(features: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(ours(features, boxes, labels, masks, generator=torch.Generator().manual_seed(0)).values())

    assert torch.autograd.gradcheck(losses, (numbers(1, 6, 4, 5).requires_grad_(), bias), fast_mode=True)


def test_sizes() -> None:
    assert ImplicitPointHead(256, 80, class_agnostic=True, device="meta").num_params == 263_169
    assert ImplicitPointHead(256, 80, device="meta").num_params == 263_169 + 79 * 257
    ours = ImplicitPointRendMask(256, 80, class_agnostic=True, device="meta")
    assert ours.parameter_head.prediction.weight.shape == (263_169, 1024)
    assert [name for name, _ in ours.point_head.named_parameters()] == []
    assert list(ours.point_head.state_dict()) == [MATRIX]
    assert ours.point_head.get_buffer(MATRIX).shape == (2, 128)


def test_start() -> None:
    ours = ImplicitPointRendMask(8, 4, hidden_features=8, parameter_hidden_channels=6)
    assert ours.parameter_head.prediction.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert ours.point_head.get_buffer(MATRIX).std().item() == pytest.approx(1, rel=0.2)
    for value in ours.state_dict().values():
        nn.init.constant_(value, torch.nan)
    ours.reset_parameters()
    assert all(value.isfinite().all() for value in ours.state_dict().values())


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize(("init", "steps", "count"), [(28, 3, 784), (16, 4, 256), (6, 2, 36), (5, 1, 26), (6, 0, 36)])
def test_inference_equals_official(agnostic: bool, init: int, steps: int, count: int) -> None:
    ours, theirs = pair(agnostic=agnostic, subdivision_num_points=count)
    features, boxes, labels = inputs()
    parameters = box_parameters(theirs, features, boxes)
    torch.testing.assert_close(ours.predict_parameters(features, boxes), parameters, **CLOSE)
    expected = official.mask_inference(
        parameters, features, boxes, torch.cat(labels), theirs.point_head, steps, init, count,
        mask_points=official.implicit_points,
    )  # fmt: skip
    expected = expected if agnostic else official.of_class(expected, torch.cat(labels))
    size = init * 2**steps
    torch.testing.assert_close(ours(features, boxes, labels, size=size), expected, **CLOSE)
    rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])
    torch.testing.assert_close(ours(features, rois, torch.cat(labels), size=size), expected, **CLOSE)
    lasting = features.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(lasting, boxes, labels, size=size), expected, **CLOSE)


@pytest.mark.parametrize("size", [1, 2, 5, 17, 30, 101])
def test_steps_and_any_size(size: int) -> None:
    ours, theirs = pair()
    features, boxes, labels = inputs()
    rois, classes = flatten(boxes, labels, CLASSES, features.device)
    parameters = ours.predict_parameters(features, boxes)
    steps = list(ours.steps(features, parameters, boxes, labels, size=size))
    assert torch.equal(steps[-1].logits, ours(features, boxes, labels, size=size))
    assert steps[-1].logits.shape == (5, 1, size, size)
    side = steps[0].logits.shape[2]
    assert side <= 6
    assert torch.equal(steps[0].points, official.regular_points(5, side))
    for before, after in itertools.pairwise([None, *steps]):
        index, points = torch.arange(side**2).expand(5, -1), after.points
        expected = torch.zeros_like(after.logits)
        if before is not None:
            expected = F.interpolate(before.logits, after.logits.shape[2:], mode="bilinear", align_corners=False)
            index, points = uncertain_points(expected, 36)
            assert torch.equal(after.points, points)
        fine = point_sample(features, points, boxes=rois, spatial_scale=0.25)
        values = official.of_class(theirs.point_head(parameters, fine, points), classes)
        expected = expected.flatten(2).scatter(2, index[:, None], values)
        torch.testing.assert_close(after.logits.flatten(2), expected)


def test_two_maps_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(channels=8, spatial_scale=(0.25, 0.125))
    features, boxes, labels = inputs()
    maps = [features, numbers(3, 2, 10, 15, seed=8)]
    parameters = ours.predict_parameters(maps, boxes)
    steps = list(ours.steps(maps, parameters, boxes, labels, size=24))
    points = steps[0].points
    fine = [official.box_sample(m, boxes, points, s) for m, s in zip(maps, (0.25, 0.125), strict=True)]
    expected = theirs.point_head(parameters, torch.cat(fine, 1), points)
    torch.testing.assert_close(steps[0].logits.flatten(2), official.of_class(expected, torch.cat(labels)), **CLOSE)
    for chunk in (1, 36 * 2, 36 * 100):
        monkeypatch.setattr(_boxes, "_CHUNK", chunk)
        torch.testing.assert_close(ours(maps, boxes, labels, size=24), steps[-1].logits)


@pytest.mark.parametrize("agnostic", [False, True])
def test_losses_equal_official(agnostic: bool) -> None:
    ours, theirs = pair(agnostic=agnostic)
    features, boxes, labels = inputs()
    masks = true_masks()
    leaf = features.requires_grad_()
    losses = ours(leaf, boxes, labels, masks, generator=torch.Generator().manual_seed(7))
    expected = official.implicit_losses(
        box_parameters(theirs, leaf, boxes), leaf, boxes, torch.cat(labels), [m.double() for m in masks],
        theirs.point_head, 20, torch.Generator().manual_seed(7),
    )  # fmt: skip
    torch.testing.assert_close(losses["loss_mask_point"], expected[0], **CLOSE)
    torch.testing.assert_close(losses["loss_l2"] * 1e5, expected[1] * 1e5, **CLOSE)
    for actual, wanted, weight in zip((losses["loss_mask_point"], losses["loss_l2"]), expected, (1, 1e5), strict=True):
        grads = [
            torch.autograd.grad(
                loss, [leaf, *model.parameter_head.parameters()], torch.tensor(weight, dtype=F64), retain_graph=True
            )
            for loss, model in ((actual, ours), (wanted, theirs))
        ]
        torch.testing.assert_close(*grads, **CLOSE)


def test_matched_and_ignored_masks() -> None:
    ours, _ = pair()
    features, boxes, labels = inputs()
    masks = [mask.double() for mask in true_masks((3, 1, 2))]
    matched = [torch.tensor([2, 0]), torch.empty(0, dtype=torch.int64), torch.tensor([1, 1, 0])]
    each = [m[i] for m, i in zip(masks, matched, strict=True)]
    actual, expected = (
        ours(features, boxes, labels, m, matched=i, generator=torch.Generator().manual_seed(0))
        for m, i in ((masks, matched), (each, None))
    )
    assert actual == expected
    # All points of the first image's boxes are ignored, so the loss is that of the other boxes.
    boxes[0] = boxes[0].clamp(4, 76)
    each[0] = torch.full_like(each[0], -1)
    some = ours(features, boxes, labels, each, generator=torch.Generator().manual_seed(0))
    points = torch.rand(5, 20, 2, generator=torch.Generator().manual_seed(0))[2:]
    fine = point_sample(
        features, points, boxes=flatten(boxes, labels, CLASSES, features.device)[0][2:], spatial_scale=0.25
    )
    logits = ours.point_head(fine, ours.predict_parameters(features, boxes)[2:], points, labels[2])
    true = official.true_masks(boxes[1:], each[1:], points)
    torch.testing.assert_close(some["loss_mask_point"], F.binary_cross_entropy_with_logits(logits[:, 0], true), **CLOSE)


@pytest.mark.parametrize("counts", [(0, 0), (0,), ()])
def test_no_boxes(counts: tuple[int, ...]) -> None:
    ours, _ = pair()
    features, boxes, labels = inputs(counts)
    for size in (24, 100):
        assert ours(features, boxes, labels, size=size).shape == (0, 1, size, size)
    losses = ours(features, boxes, labels, true_masks(counts))
    assert [loss.item() for loss in losses.values()] == [0, 0]
    for loss in losses.values():
        grads = torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(dtype: torch.dtype) -> None:
    ours, _ = pair()
    ours = ours.float()
    features, boxes, labels = inputs()
    features, boxes = features.float(), [b.float() for b in boxes]
    expected = ours(features, boxes, labels, size=24)
    scale = expected.abs().median()
    with torch.autocast("cpu", dtype):
        for some in (features, features.to(dtype)):
            actual = ours(some, boxes, labels, size=24)
            losses = ours(some, boxes, labels, true_masks())
            assert (actual.float() - expected).abs().median() < 0.1 * scale
            grads = torch.autograd.grad(sum(losses.values()), list(ours.parameters()))
            assert all(g.isfinite().all() for g in grads)
    half = copy.deepcopy(ours).to(dtype)
    actual = half(features.to(dtype), boxes, labels, size=24)
    assert actual.dtype == dtype
    # The matrix is rounded, too.
    rounded = copy.deepcopy(ours)
    rounded.point_head.to(dtype).float()
    assert (actual.float() - rounded(features, boxes, labels, size=24)).abs().median() < 0.1 * scale
    assert half(features.to(dtype), boxes, labels, true_masks())["loss_mask_point"].isfinite()


def test_small_parameters_count_in_half() -> None:
    """The parameters' squares are below the smallest float16 number."""
    ours, _ = pair()
    nn.init.zeros_(ours.parameter_head.prediction.weight)
    nn.init.constant_(ours.parameter_head.prediction.bias, 1e-4)
    features, boxes, labels = inputs()
    losses = ours.half()(features.half(), boxes, labels, true_masks())
    assert losses["loss_l2"].item() == pytest.approx(1e-13, rel=0.01, abs=0)


def test_compile() -> None:
    ours, _ = pair()
    features, boxes, labels = inputs()
    masks = [m.double() for m in true_masks()]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features, boxes, labels, size=24), ours(features, boxes, labels, size=24))
    torch.manual_seed(0)
    actual = compiled(features, boxes, labels, masks)
    torch.manual_seed(0)
    expected = ours(features, boxes, labels, masks)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(sum(x.values()), list(ours.parameter_head.parameters())) for x in (actual, expected)]
    torch.testing.assert_close(*grads)


def test_export() -> None:
    ours, _ = pair()
    features, boxes, labels = inputs()
    rois, classes = flatten(boxes, labels, CLASSES, features.device)
    count = {0: torch.export.Dim("rows", min=2, max=100)}
    program = torch.export.export(Fixed(ours), (features, rois, classes), dynamic_shapes=(None, count, count))
    for some in (slice(0, 2), slice(0, 5)):
        arguments = (features, rois[some], classes[some])
        torch.testing.assert_close(program.module()(*arguments), Fixed(ours)(*arguments))


def test_copies_and_meta() -> None:
    ours, _ = pair()
    features, boxes, labels = inputs()
    expected = ours(features, boxes, labels, size=24)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(features, boxes, labels, size=24), expected)
    meta = copy.deepcopy(ours).to("meta")
    places = [[t.to("meta") for t in some] for some in (boxes, labels)]
    assert meta(features.to("meta"), *places, size=24).shape == expected.shape
    assert "ImplicitPointRendMask(\n  spatial_scale=0.25, num_points=20, subdivision_num_points=36\n" in repr(ours)
    assert "ImplicitPointHead(6, 4, hidden_features=8, num_fc=3, class_agnostic=False)" in repr(ours)
    assert f"BoxHead(\n    6, {ours.point_head.num_params}\n" in repr(ours)


def test_official_checkpoints(tmp_path: Path) -> None:
    ours, theirs = pair()
    host = {"backbone.stem.fc1.weight": torch.ones(2), "pixel_mean": torch.ones(3)}
    state = {f"roi_heads.mask_head.{key}": value for key, value in theirs.state_dict().items()}
    torch.save({"model": {**state, **host}}, tmp_path / "model.pth")
    names = {"reduce_spatial_dim_conv": "reduce_size", "reduce_channel_dim_conv": "reduce_channels"}
    wanted: dict[str, Tensor] = theirs.state_dict()
    for old, new in names.items():
        wanted = {name.replace(old, new): value for name, value in wanted.items()}
    for form in ({**state, **host}, tmp_path / "model.pth"):
        for value in ours.state_dict().values():
            value.zero_()
        load_official(ours, form)
        assert ours.state_dict().keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in ours.state_dict().items())
    matrix = theirs.point_head.get_buffer(MATRIX)
    for form in ({**state, **host}, theirs.point_head.state_dict()):
        head = load_official(ImplicitPointHead(6, CLASSES, hidden_features=8, dtype=F64), form)
        assert torch.equal(head.get_buffer(MATRIX), matrix)
    for form in ({**state, **host}, theirs.parameter_head.state_dict()):
        head = load_official(copy.deepcopy(ours.parameter_head), form)
        assert torch.equal(head.fc2.weight, theirs.parameter_head.fc2.weight)
    # Features with more channels than hidden_channels.
    wide, theirs = pair(channels=8)
    weight = theirs.parameter_head.reduce_channel_dim_conv.weight
    assert torch.equal(wide.parameter_head.reduce_channels.weight, weight)
    for module, form, message in (
        (ours, {k: v for k, v in state.items() if MATRIX not in k}, f"missing point_head.{MATRIX}"),
        (ours, {k: v for k, v in state.items() if "fc2" not in k}, r"missing parameter_head.fc2.weight"),
        (PointRendMask(6, CLASSES), state, f"unexpected roi_heads.mask_head.point_head.{MATRIX}"),
        (CoarseMaskHead(6, CLASSES), state, "missing fc1.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            load_official(module, form)


def test_bad_inputs() -> None:
    ours, _ = pair()
    head = ours.point_head
    features, boxes, labels = inputs()
    parameters, fine, points = numbers(2, head.num_params), numbers(2, 6, 5), numbers(2, 5, 2)
    masks, joined = true_masks(), torch.cat(labels)
    rois = flatten(boxes, labels, CLASSES, features.device)[0]
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda: head(fine, parameters[:, 1:], points), ValueError, r"parameters: expected shape \(2, 2284\), got"),
        (lambda: head(fine, parameters[:1], points), ValueError, r"parameters: expected shape \(2, 2284\), got \(1,"),
        (lambda: head(fine[:, :5], parameters, points), ValueError, r"fine: expected shape \(R, 6, P\), got \(2, 5, 5"),
        (lambda: head(fine, parameters, points[:, :4]), ValueError, r"points: expected shape \(2, 5, 2\), got \(2, 4"),
        (lambda: head(fine, parameters, points, joined), ValueError, r"labels: expected shape \(2,\), got \(5,\)"),
        (lambda: head(fine, parameters, points, points), TypeError, "labels: expected an int64 Tensor"),
        (lambda: head(fine, parameters, points, joined[:2] - 9), RuntimeError, "out of bounds"),
        (lambda: ours(features, boxes, joined[:4]), ValueError, r"labels: expected shape \(5,\), got \(4,\)"),
        (lambda: ours(features, boxes[:2], labels), ValueError, "boxes: expected a tensor for each of 3 images, got 2"),
        (lambda: ours(features, boxes, labels, size=0), ValueError, "size: expected at least 1, got 0"),
        (lambda: ours(features, rois, joined, masks), ValueError, "boxes: expected a tensor for each image where"),
        (lambda: ours(features, boxes, labels, masks[:2]), ValueError, "masks: expected a tensor for each of 3 images"),
        (lambda: ours(features[:, :5], boxes, labels), ValueError, r"features: expected shape \(R, 6, 14, 14\)"),
        (
            lambda: ours.refine(features, parameters, boxes, labels),
            ValueError,
            r"parameters: expected shape \(5, 2284\), got \(2, 2284\)",
        ),
        (lambda: ImplicitPointRendMask(6, 4, num_points=0), ValueError, "num_points: expected at least 1, got 0"),
        (
            lambda: ImplicitPointRendMask(6, 4, parameter_hidden_features=0),
            ValueError,
            "hidden_features: expected at least 1, got 0",
        ),
        (lambda: ImplicitPointHead(6, 4, num_fc=0), ValueError, "num_fc: expected at least 1, got 0"),
        (lambda: ImplicitPointHead(6, 4.0), TypeError, "num_classes: expected an int, got 4.0"),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()
