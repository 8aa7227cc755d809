"""The subdivision loop shared by semantic and instance segmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers._core._torch_private import is_tracing
from paper_layers.ops.uncertain_points.pixels import uncertain_points

Size = tuple[int, int]


class RefinementStep(NamedTuple):
    """A map of the subdivision and the points predicted for it.

    Attributes:
        logits: Shape (N, C, H, W).
        points: (x, y) in [0, 1] of shape (N, P, 2); None for a map that the point head did not predict.
    """

    logits: Tensor
    points: Tensor | None


def halvings(size: Size, start: Size) -> list[Size]:
    """Halve the size, rounding up, until it is at most `start`; return all sizes, smallest first.

    Each map is at most twice as large as the one before, and the last may have any size. If `size` is ``2 ** steps``
    times `start`, these are the official sizes.

    Example:
        >>> halvings((224, 224), (7, 7))
        [(7, 7), (14, 14), (28, 28), (56, 56), (112, 112), (224, 224)]
        >>> halvings((513, 769), (65, 97))
        [(65, 97), (129, 193), (257, 385), (513, 769)]
    """
    sizes = [size]
    while sizes[0][0] > start[0] or sizes[0][1] > start[1]:
        height, width = sizes[0]
        sizes.insert(0, ((height + 1) // 2, (width + 1) // 2))
    return sizes


def grid_sizes(size: int, init_resolution: int, num_points: int) -> list[Size]:
    """Return the sizes of a box's maps; the first is the largest with at most `num_points` pixels, if any.

    The official rule doubles the first resolution, and saves a step, as long as the next map has at most `num_points`
    pixels. The last map is never skipped.

    Example:
        >>> grid_sizes(224, init_resolution=7, num_points=28 * 28)
        [(28, 28), (56, 56), (112, 112), (224, 224)]
        >>> grid_sizes(14, init_resolution=7, num_points=28 * 28)
        [(14, 14)]
    """
    sizes = halvings((size, size), (init_resolution, init_resolution))
    while len(sizes) > 1 and sizes[1][0] * sizes[1][1] <= num_points:
        del sizes[0]
    return sizes


def regular_grid(rows: int, size: Size, device: torch.device | None) -> Tensor:
    """Return the pixels' centres (x, y) in [0, 1] of maps of this size, float32 of shape (rows, H, W, 2)."""
    y, x = ((torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n for n in size)
    grid = torch.stack([x.expand(size), y[:, None].expand(size)], -1)
    return grid.expand(rows, *grid.shape)


def subdivide(
    logits: Tensor, sizes: Sequence[Size], num_points: int, predict: Callable[[Tensor], Tensor]
) -> Iterator[RefinementStep]:
    """Enlarge the map to each size in turn, and predict its most uncertain pixels again.

    Figure 4 of Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as Rendering", CVPR 2020. Earlier maps
    are not changed.

    Args:
        logits: The map to start from, of shape (N, C, H, W).
        sizes: (height, width) of each map.
        num_points: Pixels to predict in each map, at most.
        predict: Function from points (N, P, 2) to logits (N, C, P).

    Example:
        >>> sizes = [(16, 16), (32, 32)]
        >>> steps = subdivide(torch.randn(1, 3, 8, 8), sizes, 50, lambda points: points.new_ones(1, 3, 50))
        >>> [tuple(step.logits.shape) for step in steps]
        [(1, 3, 16, 16), (1, 3, 32, 32)]
    """
    for size in sizes:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        index, points = uncertain_points(logits, num_points)
        values = predict(points)
        flat = logits.flatten(2)
        # In place, except in a trace, which would lose a write into a view.
        scatter = flat.scatter if is_tracing() else flat.scatter_
        # Under autocast coarse and predicted logits may differ in dtype.
        logits = scatter(2, index[:, None].expand_as(values), values.to(logits.dtype)).view(logits.shape)
        yield RefinementStep(logits, points)


def last(steps: Iterable[RefinementStep]) -> Tensor:
    """Return the logits of the last step, without holding the earlier ones."""
    for step in steps:
        logits = step.logits
    return logits
