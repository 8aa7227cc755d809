"""The share of each cell of a box that a true mask covers, as the official RoIAlign averages it."""

from __future__ import annotations

import torch
from torch import Tensor

from paper_layers._core.library import define, library
from paper_layers._core.vmap import one_by_one

# Mask pixels converted to float at a time: 16 MB, below the 32 MB from which glibc maps new pages for each tensor.
_CHUNK = 1 << 22


def _weights(start: Tensor, size: Tensor, cells: int, length: int) -> tuple[Tensor, Tensor]:
    """Return pixels' weights (R, cells, length), summed over the samples of each cell, and samples per cell (R,).

    RoIAlign takes ``ceil(size)`` bilinear samples in a cell, so all samples along a box's side are evenly spaced. They
    are more than half a pixel apart unless each cell has a single sample. So the samples less than a pixel away from a
    given pixel are among six successive ones, or among the single samples of all cells.
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
        # Each call adds at most once to each place, so the sum does not depend on an order.
        weights.scatter_add_(1, at.where(used, 0).long()[:, None], weight.where(used, 0)[:, None])
    return weights, count[:, 0]


def _both_weights(masks: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of rows and columns, and the number (R, 1, 1) of samples in a cell."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    start, size = boxes[:, :2] - 0.5, boxes[:, 2:] - boxes[:, :2]  # Pixel centres have integer coordinates.
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
    return sums / samples  # Dividing last keeps the sums of masks of 0 and 1 exact.


def _cpu(masks: Tensor, numbers: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Compute `_reference` from the pixels under each box only, which is much faster on a CPU."""
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


# Mean of masks (M, H, W) over the cells of boxes (R, 4): (R, side, side). `numbers` (R,) are indices of masks. Equals
# detectron2's ROIAlign((side, side), 1.0, sampling_ratio=0, aligned=True).
covered_share = define(
    "point_rend_covered(Tensor masks, Tensor numbers, Tensor boxes, SymInt side) -> Tensor",
    _reference,
    _fake,
    vmap=one_by_one,
)
library.impl("point_rend_covered", _cpu, "CPU")
