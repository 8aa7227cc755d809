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

from paper_layers.point_rend import PointRendMask, _boxes, cells, load_official
from paper_layers.point_rend.targets import cell_labels, mask_loss, sample_masks
from tests.point_rend import official
from tests.point_rend.test_heads import numbers
from tests.point_rend.test_semantic import CLOSE, F64
from tests.torchvision_stub import _roi_align as roi_align

CLASSES, COUNT = 4, 30


class Official(nn.Module):
    """Both heads under the official names."""

    def __init__(self, channels: int, classes: int, agnostic: bool):
        super().__init__()
        self.coarse_head = official.CoarseHead(channels, classes, 6, 10)
        self.point_head = official.PointHead(channels, classes, 8, agnostic=agnostic)


def pair(
    channels: int = 6, classes: int = CLASSES, agnostic: bool = False, **settings: Any
) -> tuple[PointRendMask, Official]:
    theirs = official.randomize(Official(channels, classes, agnostic)).double()
    small = {"fc_dim": 8, "coarse_conv_dim": 6, "coarse_fc_dim": 10, "num_points": 20}
    small |= {"init_resolution": 3, "subdivision_num_points": COUNT}
    ours = PointRendMask(channels, classes, class_agnostic=agnostic, **{**small, **settings}, dtype=F64)
    return load_official(ours, theirs.state_dict()), theirs


def inputs(counts: tuple[int, ...] = (2, 0, 3)) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Features (3, 6, 20, 30) at a quarter of the images, boxes of which some leave them, and classes."""
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
        steps, init = 0, last  # There the official rule eats more steps than there are.
        expected = official.mask_points(
            coarse, features, boxes, theirs.point_head, official.regular_points(5, last), 0.25
        )
        expected = expected.unflatten(2, (last, last))
    else:
        expected = official.mask_inference(
            coarse, features, boxes, torch.cat(labels), theirs.point_head, steps, init, count
        )
    expected = expected if agnostic else official.of_class(expected, torch.cat(labels))
    actual = ours.refine(coarse, features, boxes, labels, size=last)
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
    """Few boxes are sampled before the first layer's product, many after it; also of two maps."""
    ours, theirs = pair(channels=8, spatial_scale=(0.25, 0.125), subdivision_num_points=200)
    features, boxes, labels = inputs()
    maps = [features, numbers(3, 2, 10, 15, seed=8)]
    coarse = numbers(5, CLASSES, 7, 7, seed=4)
    few, many = (list(ours.steps(coarse, maps, boxes, labels, size=s)) for s in (3, 48))
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
    whole = list(ours.steps(coarse, features, boxes, labels, size=24))[-1].logits
    for chunk in (1, 36, 36 * 2, 36 * 100):
        monkeypatch.setattr(_boxes, "_CHUNK", chunk)
        torch.testing.assert_close(ours(features, boxes, labels, size=24), whole)


def test_work_grows_with_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """28² points of each map, not all of its pixels: 16 times fewer than 224²."""
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


def test_matched_masks() -> None:
    """Several boxes may share a mask, as in torchvision's training."""
    ours, _ = pair()
    features, boxes, labels = inputs()
    masks = true_masks((3, 1, 2))
    matched = [torch.tensor([2, 0]), torch.empty(0, dtype=torch.int64), torch.tensor([1, 1, 0])]
    each = [m[i] for m, i in zip(masks, matched, strict=True)]
    actual, expected = (
        ours(features, boxes, labels, m, matched=i, generator=torch.Generator().manual_seed(0))
        for m, i in ((masks, matched), (each, None))
    )
    for a, b in zip(actual.values(), expected.values(), strict=True):
        assert torch.equal(a, b)


def test_labels_of_cells_and_points() -> None:
    """The left half of the box is the object; the top row of the image does not count."""
    mask = torch.zeros(1, 28, 28)
    mask[:, :, :14] = 1
    box = [torch.tensor([[0.0, 0.0, 28.0, 28.0]])]
    cells = cell_labels([mask], 7, box, None)
    assert torch.equal(cells[0], torch.tensor([1.0, 1, 1, 1, 0, 0, 0]).expand(7, 7))
    mask[:, 0] = -1
    cells = cell_labels([mask], 7, box, None)
    assert (cells[0, 0] == -1).all()
    assert torch.equal(cells[0, 1:], torch.tensor([1.0, 1, 1, 1, 0, 0, 0]).expand(6, 7))
    points = torch.tensor([[[0.5, 0.5], [0.25, 0.5], [0.5, 0.03], [0.5, 1.5]]])
    torch.testing.assert_close(sample_masks([mask], points, box, None), torch.tensor([[0.5, 1, -1, 0]]))
    for dtype in (torch.bool, torch.uint8, torch.uint16, torch.int64, torch.float16):
        values = sample_masks([mask.clamp(min=0).to(dtype)], points, box, None)
        torch.testing.assert_close(values[0, :2], torch.tensor([0.5, 1]))
    logits = torch.tensor([[3.0, -2, 5, 1]])
    value = mask_loss(logits, torch.tensor([[0.5, 1, -1, 0]]))
    keep = torch.tensor([0, 1, 3])
    torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(logits[0, keep], torch.tensor([0.5, 1, 0])))
    assert mask_loss(logits, torch.full((1, 4), -1.0)) == 0


def test_cells_are_those_of_roi_align() -> None:
    """detectron2's BitMasks.crop_and_resize: RoIAlign with as many samples in a cell as it has pixels."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(6, 12, 17, generator=generator) > 0.5).repeat_interleave(9, 1).repeat_interleave(9, 2)
    corner = 160 * torch.rand(400, 2, generator=generator, dtype=F64) - 20
    size = 0.5 + 200 * torch.rand(400, 2, generator=generator, dtype=F64) ** 3
    special = [[3, 5, 17, 12], [0, 0, 153, 108], [-30, -9, 190, 140], [8.5, 8.5, 8.6, 8.7], [-90, -90, -80, -80]]
    special += [[152.9, 107, 170, 120], [0, 0, 7e6, 7e6]]
    boxes = torch.cat([torch.cat([corner, corner + size], 1), torch.tensor(special, dtype=F64)])
    numbers = torch.randint(6, (len(boxes),), generator=generator)
    rois = torch.cat([numbers[:, None], boxes], 1)[:-1]
    expected = roi_align(mask[:, None].double(), rois, 1.0, 7, 7, 0, True)[:, 0]
    for share in (cells.covered_share, cells._reference):  # On a CPU, and elsewhere.
        for some in (mask, mask.to(torch.uint8), mask.double()):
            actual = share(some, numbers, boxes, 7)
            torch.testing.assert_close(actual[:-1], expected, rtol=0, atol=1e-12)
        assert actual[-1].count_nonzero() == 1
    labels = cell_labels([mask], 7, [boxes[:-1].float()], [numbers[:-1]])
    clear = (expected - 0.5).abs() > 1e-5
    assert torch.equal(labels.bool()[clear], (expected >= 0.5)[clear])
    assert clear.double().mean() > 0.99
    # A row of pixels is half of each cell of six: exactly so, whatever a sixth is in binary.
    half = torch.zeros(1, 42, 42, dtype=torch.bool)
    half[:, ::2] = True
    assert cell_labels([half], 7, [torch.tensor([[0.0, 0, 42, 42]])], None).all()
    empty = torch.tensor([[5.0, 5, 5, 9], [9, 9, 3, 3]])
    assert not cell_labels([torch.ones(1, 42, 42)], 7, [empty], [torch.zeros(2, dtype=torch.int64)]).any()


def test_values_out_of_range() -> None:
    """They are refused wherever they are, and named."""
    ours, _ = pair()
    features, boxes, labels = inputs()
    joined = torch.cat(labels)
    wrong: list[tuple[float, torch.dtype]] = [
        (255, torch.uint8),
        (255, torch.uint16),
        (2, torch.int64),
        (7, torch.int32),
        (-2, torch.int8),
    ]
    wrong += [(1.5, torch.float32), (-0.5, torch.float16), (torch.nan, torch.float64), (torch.inf, torch.bfloat16)]
    for value, dtype in wrong:
        masks = [mask.to(dtype) for mask in true_masks()]
        masks[2][1, 79, 119] = value
        with pytest.raises(ValueError, match=rf"masks\[2\]: expected values from 0 to 1, .* got {value}"):
            ours(features, boxes, labels, masks)
    for label in (-1, CLASSES, -9, 2**40):
        bad = joined.clone()
        bad[3] = label
        for masks in (None, true_masks()):
            with pytest.raises(ValueError, match=f"labels: expected classes from 0 to 3, got {label}"):
                ours(features, boxes, bad, masks)
    for number in (-1, 3):
        matched = [torch.arange(len(box)) for box in boxes]
        matched[2][0] = number
        with pytest.raises(ValueError, match=rf"matched\[2\]: expected numbers of 3 masks, got {number}"):
            ours(features, boxes, labels, true_masks(), matched=matched)
    for corner in (torch.nan, torch.inf):
        bad = [box.clone() for box in boxes]
        bad[0][1, 2] = corner
        with pytest.raises(ValueError, match=f"boxes: expected finite numbers, got {corner}"):
            ours(features, bad, labels, true_masks())
    with pytest.raises(ValueError, match="expected shape"):
        ours(features, boxes, labels, [mask[:, None] for mask in true_masks()])
    with pytest.raises(TypeError, match=r"masks\[0\]: expected a Tensor"):
        ours(features, boxes, labels, [mask.to(torch.complex64) for mask in true_masks()])


def test_dtypes_of_masks_and_labels() -> None:
    ours, _ = pair()
    features, boxes, labels = inputs()
    matched = [torch.arange(len(box), dtype=torch.int32) for box in boxes]

    def losses(masks: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return ours(features, boxes, labels, masks, matched=matched, generator=generator)

    expected = losses(true_masks(), labels)
    for dtype in (torch.uint8, torch.uint16, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, F64):
        masks = [mask.to(dtype) for mask in true_masks()]
        integers = torch.int16 if dtype.is_floating_point else dtype
        torch.testing.assert_close(losses(masks, [label.to(integers) for label in labels]), expected)


def test_checks_are_compiled_and_vmapped() -> None:
    """A compiler keeps a check, and each of a batch is checked."""
    ours, _ = pair()
    features, boxes, labels = inputs((2,))
    good, bad = (torch.full((2, 80, 120), value, dtype=torch.uint8) for value in (1, 255))

    def loss(masks: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        return sum(ours(features, [boxes], [labels], [masks]).values())

    refine = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert refine(good, labels[0], boxes[0]).isfinite()
    rows = torch.vmap(loss, randomness="different")
    assert rows(torch.stack([good, good]), *(t[0].expand(2, *t[0].shape) for t in (labels, boxes))).isfinite().all()
    for masks, label, box, name in (
        (bad, labels[0], boxes[0], "masks"),
        (good, labels[0] - 4, boxes[0], "labels"),
        (good, labels[0], boxes[0] * torch.nan, "boxes"),
    ):
        with pytest.raises(ValueError, match=name):
            refine(masks, label, box)
        with pytest.raises(ValueError, match=name):
            rows(*(torch.stack(pair) for pair in zip((good, labels[0], boxes[0]), (masks, label, box), strict=True)))


@pytest.mark.parametrize("counts", [(0, 0), (0,), ()])
def test_no_boxes(counts: tuple[int, ...]) -> None:
    """No masks of the size asked for, and losses of zero with a graph: both faults of the official code."""
    ours, _ = pair()
    features, boxes, labels = inputs(counts)
    for size in (24, 100):
        assert ours(features, boxes, labels, size=size).shape == (0, 1, size, size)
    losses = ours(features, boxes, labels, true_masks(counts))
    assert [loss.item() for loss in losses.values()] == [0, 0]
    grads = torch.autograd.grad(sum(losses.values()), list(ours.parameters()))
    assert not any(g.any() for g in grads)


def test_one_step_of_few_pixels() -> None:
    """1 step from 7 with 784 points: the official rule eats the step."""
    ours, _ = pair(init_resolution=7, subdivision_num_points=784)
    features, boxes, labels = inputs()
    steps = list(ours.steps(ours.coarse(features, boxes), features, boxes, labels, size=14))
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
        coarse = numbers(5, CLASSES, 7, 7).float()  # a host's own coarse logits
        assert ours.refine(coarse, features.to(dtype), boxes, labels, size=24).isfinite().all()
    half = copy.deepcopy(ours).to(dtype)
    actual = half(features.to(dtype), boxes, labels, size=24)
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().median() < 0.1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    torch._dynamo.reset()
    ours, _ = pair()
    features, boxes, labels = inputs()
    refine = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(refine(features, boxes, labels, size=24), ours(features, boxes, labels, size=24))
    masks = [m.float() for m in true_masks()]
    torch.manual_seed(0)
    actual = refine(features, boxes, labels, masks)
    torch.manual_seed(0)
    expected = ours(features, boxes, labels, masks)
    torch.testing.assert_close(actual, expected)


class Fixed(nn.Module):
    """The inference of one size, for export."""

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
    """Also without boxes, every parameter has a gradient."""
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
        (lambda: ours.refine(coarse[:4], features, boxes, labels), ValueError, r"coarse: expected shape \(5, 4, h, w"),
        (lambda: list(ours.steps(coarse, features, boxes, labels, size=0)), ValueError, "size: expected at least 1"),
        (lambda: PointRendMask(6, 4, num_points=0), ValueError, "num_points: expected at least 1, got 0"),
        (lambda: PointRendMask(6, 4, init_resolution=0), ValueError, "init_resolution: expected at least 1, got 0"),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()
