"""The share of a true mask in each cell of a box, as the official RoIAlign averages it."""

from __future__ import annotations

import torch
from torch import Tensor

from paper_layers._core.library import define, library
from paper_layers._core.vmap import one_by_one

# Pixels of masks that are in float at a time: 16 MB, below the 32 MB from where glibc maps new pages for each tensor.
_CHUNK = 1 << 22


def _weights(start: Tensor, size: Tensor, cells: int, length: int) -> tuple[Tensor, Tensor]:
    """Sums (R, cells, length) of what a row of pixels gives to the samples along a side of R boxes, and counts (R,).

    RoIAlign takes ``ceil(size)`` bilinear samples in a cell of that size, so all samples of a side are evenly spaced.
    Their distance is more than half a pixel unless each cell has a single sample. So the samples within a pixel of a
    given pixel are among six that follow one another, or among the samples of all cells.
    """
    cell = (size / cells)[:, None]
    count = cell.ceil().clamp(min=0)
    pixel = torch.arange(length, dtype=start.dtype, device=start.device)
    first = ((pixel - 1 - start[:, None]) / (cell / count) - 0.5).floor().clamp(min=0).where(count > 1, 0)
    weights = start.new_zeros(len(start), cells, length)
    for number in range(max(cells, 6)):
        sample = first + number
        at = (sample / count).floor()
        position = start[:, None] + at * cell + (sample - at * count + 0.5) * cell / count
        weight = (1 - (position.clamp(0, length - 1) - pixel).abs()).clamp(min=0)
        used = (at < cells) & (position >= -1) & (position <= length)
        # No two of a call go to one place, so the sum does not depend on their order.
        weights.scatter_add_(1, at.where(used, 0).long()[:, None], weight.where(used, 0)[:, None])
    return weights, count[:, 0]


def _both_weights(masks: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of rows and of columns, and the number (R, 1, 1) of samples in a cell."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    start, size = boxes[:, :2] - 0.5, boxes[:, 2:] - boxes[:, :2]  # Pixel centres have whole coordinates here.
    columns, wide = _weights(start[:, 0], size[:, 0], side, masks.shape[2])
    rows, high = _weights(start[:, 1], size[:, 1], side, masks.shape[1])
    return rows, columns, (high * wide).clamp(min=1)[:, None, None]


def _reference(masks: Tensor, numbers: Tensor, boxes: Tensor, side: int) -> Tensor:
    rows, columns, samples = _both_weights(masks, boxes, side)
    sums = rows.new_empty(len(boxes), side, side)
    count = max(1, _CHUNK // max(1, masks.shape[1] * masks.shape[2]))
    for first in range(0, len(boxes), count):
        some = slice(first, first + count)
        sums[some] = rows[some] @ (masks[numbers[some]].to(rows.dtype) @ columns[some].mT)
    return sums / samples  # Not before: sums of whole masks are exact.


def _cpu(masks: Tensor, numbers: Tensor, boxes: Tensor, side: int) -> Tensor:
    """The same from the pixels under each box, which costs a CPU a fraction."""
    rows, columns, samples = _both_weights(masks, boxes, side)
    sums = rows.new_empty(len(boxes), side, side)
    limits = [length - 1 for length in (masks.shape[2], masks.shape[1])] * 2
    window = torch.cat([boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1], 1).clamp(min=0)
    window = window.minimum(window.new_tensor(limits)).long()
    for row, (mask, (x1, y1, x2, y2)) in enumerate(zip(numbers.tolist(), window.tolist(), strict=True)):
        high, wide = slice(y1, y2 + 1), slice(x1, x2 + 1)
        pixels = masks[mask, high, wide].to(rows.dtype)
        sums[row] = rows[row, :, high] @ pixels @ columns[row, :, wide].mT
    return sums / samples


def _fake(masks: Tensor, numbers: Tensor, boxes: Tensor, side: int) -> Tensor:
    return boxes.new_empty((boxes.shape[0], side, side), dtype=torch.promote_types(boxes.dtype, torch.float32))


# The mean (R, side, side) of masks (M, H, W) over the cells of boxes (R, 4), of which each has the number of its mask:
# detectron2's ROIAlign((side, side), 1.0, sampling_ratio=0, aligned=True).
covered_share = define(
    "point_rend_covered(Tensor masks, Tensor numbers, Tensor boxes, SymInt side) -> Tensor",
    _reference,
    _fake,
    vmap=one_by_one,
)
library.impl("point_rend_covered", _cpu, "CPU")
