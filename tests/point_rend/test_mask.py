"""PointRend for instance segmentation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers.point_rend import PointRendMask, _boxes, load_official
from paper_layers.point_rend._targets import cell_labels
from testing.official import point_rend as official
from tests.point_rend.test_heads import numbers
from tests.point_rend.test_semantic import CLOSE, F64

CLASSES, COUNT = 4, 30


class Official(nn.Module):
    """Hold both heads under the official names."""

    def __init__(self, channels: int, classes: int, agnostic: bool):
        super().__init__()
        self.coarse_head = official.CoarseHead(channels, classes, 6, 10)
        self.point_head = official.PointHead(channels, classes, 8, agnostic=agnostic)


def pair(
    channels: int = 6, classes: int = CLASSES, agnostic: bool = False, **settings: Any
) -> tuple[PointRendMask, Official]:
    theirs = official.randomize(Official(channels, classes, agnostic)).double()
    small = {"hidden_features": 8, "coarse_hidden_channels": 6, "coarse_hidden_features": 10, "num_points": 20}
    small |= {"init_resolution": 3, "subdivision_num_points": COUNT}
    ours = PointRendMask(channels, classes, class_agnostic=agnostic, **{**small, **settings}, dtype=F64)
    return load_official(ours, theirs.state_dict()), theirs


def inputs(counts: tuple[int, ...] = (2, 0, 3)) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return features of stride 4 for images of 80 x 120, boxes that partly leave the images, and classes."""
    generator = torch.Generator().manual_seed(1)
    features = numbers(len(counts), 6, 20, 30)
    boxes = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator, dtype=F64) * torch.tensor([110.0, 70.0]) - 10
        boxes.append(torch.cat([corner, corner + 5 + 40 * torch.rand(count, 2, generator=generator, dtype=F64)], 1))
    labels = [torch.randint(CLASSES, (count,), generator=generator) for count in counts]
    return features, boxes, labels


def true_masks(counts: tuple[int, ...] = (2, 0, 3)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    small = [torch.rand(n, 10, 15, generator=generator) > 0.5 for n in counts]
    return [mask.repeat_interleave(8, 1).repeat_interleave(8, 2) for mask in small]


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize(
    ("steps", "init", "count"), [(5, 7, 784), (5, 3, 30), (3, 3, 36), (2, 2, 10_000), (3, 4, 5), (0, 3, 30)]
)
def test_inference_equals_official(agnostic: bool, steps: int, init: int, count: int) -> None:
    ours, theirs = pair(agnostic=agnostic, init_resolution=init, subdivision_num_points=count)
    features, boxes, labels = inputs()
    coarse = numbers(5, CLASSES, 7, 7, seed=4)
    last = init * 2**steps
    if 4 * init * init <= count and 4**steps * init * init <= count:
        steps, init = 0, last  # The official rule skips more maps than there are.
        expected = official.mask_points(
            coarse, features, boxes, theirs.point_head, official.regular_points(5, last), 0.25
        )
        expected = expected.unflatten(2, (last, last))
    else:
        expected = official.mask_inference(
            coarse, features, boxes, torch.cat(labels), theirs.point_head, steps, init, count
        )
    expected = expected if agnostic else official.of_class(expected, torch.cat(labels))
    actual = ours.refine(features, coarse, boxes, labels, size=last)
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_whole_inference_equals_official() -> None:
    ours, theirs = pair()
    features, boxes, labels = inputs()
    roi = official.box_sample(features, boxes, official.regular_points(5, 14), 0.25).unflatten(2, (14, 14))
    coarse = theirs.coarse_head(roi)
    torch.testing.assert_close(ours.coarse(features, boxes), coarse, **CLOSE)
    expected = official.mask_inference(coarse, features, boxes, torch.cat(labels), theirs.point_head, 3, 3, COUNT)
    expected = official.of_class(expected, torch.cat(labels))
    torch.testing.assert_close(ours(features, boxes, labels, size=24), expected, **CLOSE)
    rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])
    torch.testing.assert_close(ours(features, rois, torch.cat(labels), size=24), expected, **CLOSE)
    lasting = features.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(lasting, boxes, labels, size=24), expected, **CLOSE)


def test_products_before_and_after_sampling() -> None:
    """Features are multiplied after sampling for few points, before sampling for many; also with two maps."""
    ours, theirs = pair(channels=8, spatial_scale=(0.25, 0.125), subdivision_num_points=200)
    features, boxes, labels = inputs()
    maps = [features, numbers(3, 2, 10, 15, seed=8)]
    coarse = numbers(5, CLASSES, 7, 7, seed=4)
    few, many = (list(ours.steps(maps, coarse, boxes, labels, size=s)) for s in (3, 48))
    assert sum(m.shape[0] * m.shape[2] * m.shape[3] for m in maps) > few[0].points.shape[1] * 5
    assert sum(m.shape[0] * m.shape[2] * m.shape[3] for m in maps) < sum(s.points.shape[1] for s in many) * 5
    for steps in (few, many):
        points = steps[0].points
        fine = [official.box_sample(m, boxes, points, s) for m, s in zip(maps, (0.25, 0.125), strict=True)]
        expected = theirs.point_head(torch.cat(fine, 1), official.point_sample(coarse, points))
        torch.testing.assert_close(steps[0].logits.flatten(2), official.of_class(expected, torch.cat(labels)), **CLOSE)


@pytest.mark.parametrize("counts", [(2, 0, 3), (1, 0, 0)])
def test_chunks_change_nothing(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    features, boxes, labels = inputs(counts)
    coarse = ours.coarse(features, boxes)
    whole = list(ours.steps(features, coarse, boxes, labels, size=24))[-1].logits
    for chunk in (1, 36, 36 * 2, 36 * 100):
        monkeypatch.setattr(_boxes, "_CHUNK", chunk)
        torch.testing.assert_close(ours(features, boxes, labels, size=24), whole)


def test_work_grows_with_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """28² points of each map are predicted, in all 16 times fewer than 224²."""
    ours, _ = pair(init_resolution=7, subdivision_num_points=28 * 28)
    features, boxes, labels = inputs()
    counted: list[int] = []
    finish = type(ours.point_head).finish

    def counting(head: nn.Module, fine: Tensor, *rest: Any) -> Tensor:
        counted.append(fine.shape[0] * fine.shape[2])
        return finish(head, fine, *rest)

    monkeypatch.setattr(type(ours.point_head), "finish", counting)
    found = []
    for size in (28, 56, 112, 224):
        counted.clear()
        ours(features, boxes, labels, size=size)
        found.append(sum(counted) / 5)
    assert found == [784, 2 * 784, 3 * 784, 4 * 784]
    assert 16 * found[-1] == 224**2


@pytest.mark.parametrize("agnostic", [False, True])
def test_point_loss_equals_official(agnostic: bool) -> None:
    ours, theirs = pair(agnostic=agnostic)
    features, boxes, labels = inputs()
    masks = true_masks()
    leaf = features.requires_grad_()
    losses = ours(leaf, boxes, labels, masks, generator=torch.Generator().manual_seed(7))
    roi = official.box_sample(leaf, boxes, official.regular_points(5, 14), 0.25).unflatten(2, (14, 14))
    coarse = theirs.coarse_head(roi)
    expected = official.mask_point_loss(
        coarse, leaf, boxes, torch.cat(labels), [m.double() for m in masks], theirs.point_head, 20,
        torch.Generator().manual_seed(7),
    )  # fmt: skip
    assert list(losses) == ["loss_mask", "loss_mask_point"]
    torch.testing.assert_close(losses["loss_mask_point"], expected, **CLOSE)
    own = official.of_class(coarse, torch.cat(labels))[:, 0]
    cells = cell_labels(masks, 7, boxes, None).double()
    coarse_loss = F.binary_cross_entropy_with_logits(own, cells)
    torch.testing.assert_close(losses["loss_mask"], coarse_loss, **CLOSE)
    grads = torch.autograd.grad(sum(losses.values()), [leaf, *ours.parameters()])
    names = [name for name, _ in ours.named_parameters()]
    expected_grads = dict(zip(
        [n for n, _ in theirs.named_parameters()],
        torch.autograd.grad(expected + coarse_loss, [leaf, *theirs.parameters()])[1:],
        strict=True,
    ))  # fmt: skip
    for name, grad in zip(names, grads[1:], strict=True):
        name = name.replace("reduce_size", "reduce_spatial_dim_conv")
        for number in range(3):
            name = name.replace(f"layers.{number}", f"fc{number + 1}")
        torch.testing.assert_close(grad, expected_grads[name].reshape(grad.shape), **CLOSE, msg=name)


@pytest.mark.parametrize("counts", [(0, 0), (0,), ()])
def test_no_boxes(counts: tuple[int, ...]) -> None:
    """Masks have the given size and losses are zero with a graph; the official code fails in both."""
    ours, _ = pair()
    features, boxes, labels = inputs(counts)
    for size in (24, 100):
        assert ours(features, boxes, labels, size=size).shape == (0, 1, size, size)
    losses = ours(features, boxes, labels, true_masks(counts))
    assert [loss.item() for loss in losses.values()] == [0, 0]
    grads = torch.autograd.grad(sum(losses.values()), list(ours.parameters()))
    assert not any(g.any() for g in grads)


def test_one_step_of_few_pixels() -> None:
    """With 1 step from 7 and 784 points the official rule skips the last map."""
    ours, _ = pair(init_resolution=7, subdivision_num_points=784)
    features, boxes, labels = inputs()
    steps = list(ours.steps(features, ours.coarse(features, boxes), boxes, labels, size=14))
    assert [tuple(s.logits.shape) for s in steps] == [(5, 1, 14, 14)]


@pytest.mark.parametrize("size", [1, 2, 5, 17, 30, 101])
def test_any_size(size: int) -> None:
    ours, _ = pair()
    features, boxes, labels = inputs()
    masks = ours(features, boxes, labels, size=size)
    assert masks.shape == (5, 1, size, size)
    assert masks.isfinite().all()


def test_degenerate_boxes() -> None:
    ours, _ = pair()
    features, _, _ = inputs((1,))
    boxes = [torch.tensor([[5.0, 5, 5, 5], [-90, -90, -80, -80], [0, 0, 1e9, 1e9], [9, 9, 3, 3]], dtype=F64)]
    labels = [torch.arange(4)]
    assert ours(features, boxes, labels, size=24).isfinite().all()
    losses = ours(features, boxes, labels, [torch.ones(4, 80, 120)])
    assert all(loss.isfinite() for loss in losses.values())


def test_one_class() -> None:
    ours, _ = pair(classes=1)
    features, boxes, _ = inputs()
    labels = [torch.zeros(len(b), dtype=torch.int64) for b in boxes]
    assert ours(features, boxes, labels, size=24).shape == (5, 1, 24, 24)
    assert all(loss.isfinite() for loss in ours(features, boxes, labels, true_masks()).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(dtype: torch.dtype) -> None:
    ours, _ = pair()
    ours = ours.float()
    features, boxes, labels = inputs()
    features, boxes = features.float(), [b.float() for b in boxes]
    expected = ours(features, boxes, labels, size=24)
    with torch.autocast("cpu", dtype):
        for some in (features, features.to(dtype)):
            actual = ours(some, boxes, labels, size=24)
            losses = ours(some, boxes, labels, true_masks())
            assert (actual.float() - expected).abs().median() < 0.1
            grads = torch.autograd.grad(sum(losses.values()), list(ours.parameters()))
            assert all(g.isfinite().all() for g in grads)
        coarse = numbers(5, CLASSES, 7, 7).float()  # A host's own coarse logits.
        assert ours.refine(features.to(dtype), coarse, boxes, labels, size=24).isfinite().all()
    half = copy.deepcopy(ours).to(dtype)
    actual = half(features.to(dtype), boxes, labels, size=24)
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().median() < 0.1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    torch._dynamo.reset()
    ours, _ = pair()
    counts, size = ((2, 0), 6) if dynamic else ((2, 0, 3), 24)  # Symbolic sizes take long to compile.
    features, boxes, labels = inputs(counts)
    refine = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(refine(features, boxes, labels, size=size), ours(features, boxes, labels, size=size))
    masks = [m.float() for m in true_masks(counts)]
    torch.manual_seed(0)
    actual = refine(features, boxes, labels, masks)
    torch.manual_seed(0)
    expected = ours(features, boxes, labels, masks)
    torch.testing.assert_close(actual, expected)


class Fixed(nn.Module):
    """Infer masks of one size, for export."""

    def __init__(self, masks: nn.Module):
        super().__init__()
        self.masks = masks

    def forward(self, features: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        return self.masks(features, boxes, labels, size=24)


def test_export() -> None:
    ours, _ = pair()
    features, boxes, labels = inputs()
    rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])
    rows = {0: torch.export.Dim("rows", min=2, max=100)}
    arguments = (features, rois, torch.cat(labels))
    for strict in (False, True):
        program = torch.export.export(Fixed(ours), arguments, dynamic_shapes=(None, rows, rows), strict=strict)
        for some in (slice(0, 2), slice(0, 5)):
            arguments = (features, rois[some], torch.cat(labels)[some])
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
    for parameter in ours.parameters():
        nn.init.constant_(parameter, torch.nan)
    ours.reset_parameters()
    assert ours(features, boxes, labels, size=24).isfinite().all()
    assert "spatial_scale=0.25, num_points=20" in repr(ours)
    assert f"init_resolution=3, subdivision_num_points={COUNT}" in repr(ours)


def test_distributed(tmp_path: Any) -> None:
    """Every parameter has a gradient, also without boxes."""
    ours, _ = pair()
    twin = copy.deepcopy(ours)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(ours)
        for counts in ((2, 0, 3), (0,)):
            arguments = (*inputs(counts), true_masks(counts))
            for model in (parallel, twin):
                sum(model(*arguments, generator=torch.Generator().manual_seed(0)).values()).backward()
            for actual, expected in zip(ours.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(actual.grad, expected.grad)
    finally:
        dist.destroy_process_group()


def test_bad_inputs() -> None:
    ours, _ = pair()
    features, boxes, labels = inputs()
    masks, coarse = true_masks(), numbers(5, CLASSES, 7, 7)
    joined = torch.cat(labels)
    rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda: ours(features, boxes, joined[:4]), ValueError, r"labels: expected shape \(5,\), got \(4,\)"),
        (lambda: ours(features, boxes, joined.float()), TypeError, "labels: expected an int64 Tensor"),
        (lambda: ours(features, boxes[:2], labels), ValueError, "boxes: expected a tensor for each of 3 images, got 2"),
        (lambda: ours(features, [b[:, :3] for b in boxes], labels), ValueError, r"boxes\[0\]: expected shape \(R"),
        (lambda: ours(features, boxes, labels, size=0), ValueError, "size: expected at least 1, got 0"),
        (lambda: ours(features, boxes, labels, size=2.5), TypeError, "size: expected an int, got 2.5"),
        (
            lambda: ours(features, rois, joined, masks),
            ValueError,
            "boxes: expected a tensor for each image where there",
        ),
        (lambda: ours(features, boxes, labels, masks[:2]), ValueError, "masks: expected a tensor for each of 3 images"),
        (lambda: ours(features, boxes, labels, true_masks((2, 0, 2))), ValueError, r"masks\[2\]: expected a mask for"),
        (
            lambda: ours(features, boxes, labels, masks, matched=[torch.zeros(2)] * 3),
            TypeError,
            r"matched\[0\]: expected an int64 Tensor",
        ),
        (
            lambda: ours(features, boxes, labels, masks, matched=labels[:2]),
            ValueError,
            "matched: expected a tensor for",
        ),
        (lambda: ours(features[:, :5], boxes, labels), ValueError, r"features: expected shape \(R, 6, 14, 14\)"),
        (lambda: ours.refine(features, coarse[:4], boxes, labels), ValueError, r"coarse: expected shape \(5, 4, h, w"),
        (lambda: list(ours.steps(features, coarse, boxes, labels, size=0)), ValueError, "size: expected at least 1"),
        (lambda: PointRendMask(6, 4, num_points=0), ValueError, "num_points: expected at least 1, got 0"),
        (lambda: PointRendMask(6, 4, init_resolution=0), ValueError, "init_resolution: expected at least 1, got 0"),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()
