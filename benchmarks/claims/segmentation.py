"""Measures of label maps, overall and at the borders of their classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Scores(NamedTuple):
    """Mean scores over the classes, in percent."""

    miou: float
    near: float  # mIoU only of pixels near true borders.
    boundary: float  # Boundary IoU.


def bands(masks: Tensor, counted: Tensor, distance: int) -> Tensor:
    """Return each mask's (N, K, H, W) pixels that have a counted pixel outside the mask within `distance`.

    The distance is the maximum of rows and columns, as in repeated 3 x 3 erosions. The image's frame is not a border.
    """
    outside = (~masks & counted).float()
    return masks & (F.max_pool2d(outside, 2 * distance + 1, stride=1, padding=distance) > 0)


class Overlaps:
    """Intersections and unions of predicted and true classes, summed over images.

    Boundary IoU: Cheng, Girshick, Dollár, Berg, Kirillov, "Boundary IoU", CVPR 2021, equation 1. For each class, it is
    the IoU of the predicted pixels near the predicted border and the true pixels near the true border. Classes without
    predicted or true pixels are ignored.
    """

    def __init__(self, classes: int, distance: int, ignored: int):
        self.classes, self.distance, self.ignored = classes, distance, ignored
        self.counts = torch.zeros(3, 2, classes, dtype=torch.int64)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Add label maps (N, H, W)."""
        counted = (truth != self.ignored)[:, None]
        number = torch.arange(self.classes)[:, None, None]
        ours, theirs = ((labels[:, None] == number) & counted for labels in (predicted, truth))
        our_bands, their_bands = (bands(masks, counted, self.distance) for masks in (ours, theirs))
        near = their_bands.any(1, keepdim=True)
        for count, one, other in zip(
            self.counts, (ours, ours & near, our_bands), (theirs, theirs & near, their_bands), strict=True
        ):
            count += torch.stack([(one & other).sum((0, 2, 3)), (one | other).sum((0, 2, 3))])

    def scores(self) -> Scores:
        intersection, union = self.counts.double().unbind(1)
        return Scores(*(100 * intersection / union).nanmean(1).tolist())  # 0 / 0 is NaN.
