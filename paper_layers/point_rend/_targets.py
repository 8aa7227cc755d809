"""True masks in boxes, and the loss of predicted masks against them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers._core import checks, values
from paper_layers.ops.point_sample import point_sample
from paper_layers.point_rend._cells import covered_share


def mask_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean binary cross-entropy over labels other than -1, or zero if there are none."""
    counted = labels >= 0
    loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return loss.where(counted, 0).sum() / counted.sum().clamp(min=1)


def sample_masks(
    masks: Sequence[Tensor], points: Tensor, boxes: Sequence[Tensor], matched: Sequence[Tensor] | None
) -> Tensor:
    """Sample true masks at points (R, ..., 2) of all boxes: (R, ...), soft at borders, -1 next to a pixel of -1."""
    values = [points.new_empty(0, *points.shape[1:-1])]
    parts = [some for some in points.split([box.shape[0] for box in boxes]) if some.shape[0] > 0]
    for (mask, numbers, box), some in zip(_images(masks, boxes, matched), parts, strict=True):
        maps = [part[:, None].to(points.dtype) for part in _parts(mask)]
        value, *ignored = point_sample(maps, some, boxes=torch.cat([numbers[:, None].to(box.dtype), box], 1)).unbind(1)
        values.append(value.where(ignored[0] == 0, -1) if ignored else value)
    return torch.cat(values)


def cell_labels(
    masks: Sequence[Tensor], side: int, boxes: Sequence[Tensor], matched: Sequence[Tensor] | None
) -> Tensor:
    """Label side x side cells of each box: 1 if the true mask covers half of it, else 0; -1 next to a pixel of -1."""
    labels = [torch.empty(0, side, side, device=masks[0].device if masks else None)]
    for mask, numbers, box in _images(masks, boxes, matched):
        covered, *ignored = (covered_share(part, numbers, box.detach(), side) for part in _parts(mask))
        value = (covered >= 0.5).to(covered.dtype)
        labels.append(value.where(ignored[0] == 0, -1) if ignored else value)
    return torch.cat(labels)


def _parts(mask: Tensor) -> list[Tensor]:
    """Return the mask without ignored pixels and, for a signed dtype, the ignored pixels."""
    return [mask.clamp(min=0), mask < 0] if mask.dtype.is_signed else [mask]


def _images(
    masks: Sequence[Tensor], boxes: Sequence[Tensor], matched: Sequence[Tensor] | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield, for each image with boxes, its masks (M, H, W), the index of each box's mask, and the boxes."""
    if len(masks) != len(boxes):
        raise ValueError(f"masks: expected a tensor for each of {len(boxes)} images, got {len(masks)}")
    if matched is not None and len(matched) != len(boxes):
        raise ValueError(f"matched: expected a tensor for each of {len(boxes)} images, got {len(matched)}")
    for image, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        name = f"masks[{image}]"
        if not isinstance(mask, Tensor) or mask.dtype.is_complex:
            raise TypeError(f"{name}: expected a Tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        checks.shape(name, mask, ("M", "H", "W"))
        if matched is not None:
            numbers = values.integers(f"matched[{image}]", matched[image], box.shape[0])
            expected, last = f"numbers of {mask.shape[0]} masks", mask.shape[0] - 1
            numbers = values.within(f"matched[{image}]", numbers, 0, last, expected)
        elif mask.shape[0] != box.shape[0]:
            raise ValueError(f"{name}: expected a mask for each of {box.shape[0]} boxes, got {mask.shape[0]}")
        else:
            numbers = torch.arange(box.shape[0], device=box.device)
        if box.shape[0] == 0:
            continue
        if mask.dtype in values.WIDE_UNSIGNED:
            mask = mask.float()
        if mask.dtype != torch.bool:
            other = -1 if mask.dtype.is_signed else None
            expected = "values from 0 to 1, or -1 where a pixel does not count"
            mask = values.within(name, mask, 0, 1, expected, other=other)
        yield mask, numbers, box
