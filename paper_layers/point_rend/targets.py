"""Boxes, and the true masks in them: what the masks' losses are taken against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers.ops import _checks
from paper_layers.ops.point_sample import point_sample
from paper_layers.point_rend.subdivision import regular_grid

Boxes = Tensor | Sequence[Tensor]

_SAMPLES = 4  # Along each side of a coarse pixel.


def rows(boxes: Boxes, labels: Tensor | Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """All boxes (R, 5), with the image's number first, and their classes (R,)."""
    if isinstance(boxes, Tensor):
        parts = [boxes]
    else:
        parts = [F.pad(part, (1, 0), value=number) for number, part in enumerate(boxes)]
    for part in parts:
        if part.dim() != 2 or part.shape[1] != 5:
            raise ValueError(f"boxes: expected shape (R_i, 4) for each image or (R, 5), got {tuple(part.shape)}")
    rois = torch.cat(parts) if parts else torch.empty(0, 5, device=device)
    if not isinstance(labels, Tensor):
        labels = torch.cat(list(labels)) if labels else torch.empty(0, dtype=torch.int64, device=device)
    labels = _checks.int64("labels", labels, rois.shape[0])
    return rois, labels


def mask_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy over the labels that are not -1; zero if there are none."""
    counted = labels >= 0
    loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return loss.where(counted, 0).sum() / counted.sum().clamp(min=1)


def sample_masks(
    masks: Sequence[Tensor], points: Tensor, boxes: Sequence[Tensor], matched: Sequence[Tensor] | None
) -> Tensor:
    """The true masks at points (R, ..., 2) of all images' boxes: (R, ...), soft at borders, -1 beside a pixel of -1."""
    if len(masks) != len(boxes):
        raise ValueError(f"masks: expected a tensor for each of {len(boxes)} images, got {len(masks)}")
    if matched is not None and len(matched) != len(boxes):
        raise ValueError(f"matched: expected a tensor for each of {len(boxes)} images, got {len(matched)}")
    values = [points.new_empty(0, *points.shape[1:-1])]
    for image, (mask, box, some) in enumerate(
        zip(masks, boxes, points.split([box.shape[0] for box in boxes]), strict=True)
    ):
        if matched is None:
            if mask.shape[0] != box.shape[0]:
                raise ValueError(
                    f"masks[{image}]: expected a mask for each of {box.shape[0]} boxes, got {mask.shape[0]}"
                )
            number = torch.arange(box.shape[0], device=box.device)
        else:
            number = matched[image]
            _checks.int64(f"matched[{image}]", number, box.shape[0])
        if box.shape[0] == 0:
            continue
        rois = torch.cat([number[:, None].to(box.dtype), box], 1)
        maps = [(mask[:, None].clamp(min=0) if mask.dtype.is_signed else mask[:, None]).to(points.dtype)]
        if mask.dtype.is_signed:
            maps.append((mask[:, None] < 0).to(points.dtype))
        value, *ignored = point_sample(maps, some, boxes=rois).unbind(1)
        values.append(value.where(ignored[0] == 0, -1) if ignored else value)
    return torch.cat(values)


def cell_labels(
    masks: Sequence[Tensor], side: int, boxes: Sequence[Tensor], matched: Sequence[Tensor] | None
) -> Tensor:
    """Whether the true mask covers half of each of side x side cells of the boxes: (R, side, side) of 0, 1, or -1."""
    device = masks[0].device if masks else None
    grid = regular_grid(sum(box.shape[0] for box in boxes), (side * _SAMPLES, side * _SAMPLES), device)
    values = sample_masks(masks, grid, boxes, matched)
    covered = F.avg_pool2d(values[:, None].clamp(min=0), _SAMPLES)[:, 0] >= 0.5
    ignored = F.avg_pool2d((values[:, None] < 0).to(values.dtype), _SAMPLES)[:, 0] > 0
    return covered.to(values.dtype).where(~ignored, -1)
