"""Boxes and the refinement of their masks, shared by PointRend's mask head and the implicit one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers._core import checks, values
from paper_layers.ops.point_sample import point_sample
from paper_layers.point_rend._subdivision import RefinementStep, Size, last, regular_grid, subdivide

Features = Tensor | Sequence[Tensor]
Boxes = Tensor | Sequence[Tensor]
Labels = Tensor | Sequence[Tensor]
Predict = Callable[[Tensor], Tensor]  # From points (R, P, 2) in boxes to logits (R, 1, P).

# Points predicted at once in inference. At the default widths each of their tensors has 3 MB: it stays in the cache,
# and far below the 32 MB from which glibc maps new pages for each tensor.
_CHUNK = 4 * 28 * 28


def flatten(boxes: Boxes, labels: Labels, num_classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return all boxes as (R, 5), with the image's number first, and their classes as int64 (R,)."""
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
    labels = values.integers("labels", labels, rois.shape[0])
    checks.same_device("labels", labels, "boxes", rois)
    # An exported program should run without Python, and the heads' indexing refuses wrong labels too.
    return rois, labels if torch.compiler.is_exporting() else values.labels("labels", labels, num_classes)


def finite(boxes: Tensor) -> Tensor:
    """Return boxes (R, 5) to train on; refuse corners that would make the losses NaN."""
    largest = sys.float_info.max
    corners = values.within("boxes", boxes[:, 1:], -largest, largest, "finite numbers")
    # All corners are finite here: `where` only keeps a compiler from dropping the check.
    return boxes.where(corners.isfinite().all(1, keepdim=True), 0)


def grid_features(features: Features, boxes: Boxes, side: int, spatial_scale: float | Sequence[float]) -> Tensor:
    """Sample the features on a regular grid in each box: (R, C, side, side)."""
    count = boxes.shape[0] if isinstance(boxes, Tensor) else sum(box.shape[0] for box in boxes)
    first = features if isinstance(features, Tensor) else features[0]
    grid = regular_grid(count, (side, side), first.device)
    return point_sample(features, grid, boxes=boxes, spatial_scale=spatial_scale)


def points_per_map(sizes: Sequence[Size], num_points: int) -> list[int]:
    """Return how many points of each map are predicted."""
    first, *rest = (height * width for height, width in sizes)
    return [first, *(min(pixels, num_points) for pixels in rest)]


class Refinement(NamedTuple):
    """Predict each box's first map whole, then the most uncertain points of each larger map.

    Attributes:
        predictor: Makes, from `inputs` or some of their rows, the function from points in the boxes to logits.
        inputs: Tensors with a row for each box.
        sizes: (height, width) of each map.
        num_points: Points predicted for each map after the first, at most.
    """

    predictor: Callable[..., Predict]
    inputs: tuple[Tensor, ...]
    sizes: list[Size]
    num_points: int

    def steps(self) -> Iterator[RefinementStep]:
        """Yield the maps of all boxes, smallest first."""
        predict = self.predictor(*self.inputs)
        points = regular_grid(self.inputs[0].shape[0], self.sizes[0], self.inputs[0].device).flatten(1, 2)
        logits = predict(points).unflatten(2, self.sizes[0])
        yield RefinementStep(logits, points)
        yield from subdivide(logits, self.sizes[1:], self.num_points, predict)

    def masks(self) -> Tensor:
        """Return the last map (R, 1, H, W), computed a few boxes at a time."""
        rows, count = self.inputs[0].shape[0], max(1, _CHUNK // max(points_per_map(self.sizes, self.num_points)))
        # A compiler plans the memory itself, and should not unroll a loop over boxes.
        if torch.compiler.is_compiling() or rows <= count:
            return last(self.steps())
        masks = self.inputs[0].new_empty(0)
        for first in range(0, rows, count):
            some = slice(first, first + count)
            logits = last(self._replace(inputs=tuple(x[some] for x in self.inputs)).steps())
            if first == 0:
                masks = logits.new_empty(rows, *logits.shape[1:])
            masks[some] = logits
        return masks
