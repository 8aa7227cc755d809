"""True masks, labels and boxes to train on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers.point_rend import _cells
from paper_layers.point_rend._targets import cell_labels, mask_loss, sample_masks
from testing.torchvision_stub import _roi_align as roi_align
from tests.point_rend.test_mask import CLASSES, inputs, pair, true_masks
from tests.point_rend.test_semantic import F64


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
    for share in (_cells.covered_share, _cells._reference):  # On CPUs, on other devices.
        for some in (mask, mask.to(torch.uint8), mask.double()):
            actual = share(some, numbers, boxes, 7)
            torch.testing.assert_close(actual[:-1], expected, rtol=0, atol=1e-12)
        assert actual[-1].count_nonzero() == 1
    labels = cell_labels([mask], 7, [boxes[:-1].float()], [numbers[:-1]])
    clear = (expected - 0.5).abs() > 1e-5
    assert torch.equal(labels.bool()[clear], (expected >= 0.5)[clear])
    assert clear.double().mean() > 0.99
    # Every second row covers exactly half of each cell, though 1/6 is not exact in binary.
    half = torch.zeros(1, 42, 42, dtype=torch.bool)
    half[:, ::2] = True
    assert cell_labels([half], 7, [torch.tensor([[0.0, 0, 42, 42]])], None).all()
    empty = torch.tensor([[5.0, 5, 5, 9], [9, 9, 3, 3]])
    assert not cell_labels([torch.ones(1, 42, 42)], 7, [empty], [torch.zeros(2, dtype=torch.int64)]).any()


def test_values_out_of_range() -> None:
    """Values out of range are refused at any position, and the error names the argument."""
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
    """A compiled model keeps the checks, and vmap checks each element."""
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
