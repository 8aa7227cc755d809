"""Scores of label maps against formulas for every pixel."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from benchmarks.claims.segmentation import Overlaps, Scores

IGNORED = 255
Pixels = set[tuple[int, int, int]]  # (image, row, column)


def pixels(labels: Tensor, truth: Tensor, number: int) -> Pixels:
    places = itertools.product(*map(range, labels.shape))
    return {p for p in places if labels[p] == number and truth[p] != IGNORED}


def near_border(mask: Pixels, truth: Tensor, distance: int) -> Pixels:
    """Return a mask's pixels with a counted pixel outside it, at most `distance` rows and columns away."""
    other = {p for p in itertools.product(*map(range, truth.shape)) if truth[p] != IGNORED} - mask
    return {
        (i, y, x) for i, y, x in mask if any(j == i and max(abs(v - y), abs(u - x)) <= distance for j, v, u in other)
    }


def ratio(one: Pixels, other: Pixels) -> float:
    return 100 * len(one & other) / len(one | other) if one | other else math.nan


def slow_scores(predicted: Tensor, truth: Tensor, classes: int, distance: int) -> Scores:
    masks = [(pixels(predicted, truth, k), pixels(truth, truth, k)) for k in range(classes)]
    bands = [tuple(near_border(mask, truth, distance) for mask in pair) for pair in masks]
    near = set().union(*(theirs for _, theirs in bands))
    columns = (
        [ratio(ours, theirs) for ours, theirs in masks],
        [ratio(ours & near, theirs & near) for ours, theirs in masks],
        [ratio(ours, theirs) for ours, theirs in bands],
    )
    return Scores(*(torch.tensor(column).nanmean().item() for column in columns))


@pytest.mark.parametrize("distance", [1, 2, 3])
@pytest.mark.parametrize("ignored", [False, True])
def test_against_slow_formula(distance: int, ignored: bool) -> None:
    generator = torch.Generator().manual_seed(distance)
    classes = 4  # The last class does not occur.
    # Areas rather than noise, so that masks have an inside.
    truth = torch.randint(3, (3, 4, 5), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    predicted = truth.roll((1, -1), (1, 2))
    predicted[torch.rand(truth.shape, generator=generator) < 0.02] = 0
    if ignored:
        truth[torch.rand(truth.shape, generator=generator) < 0.1] = IGNORED
    overlaps = Overlaps(classes, distance, IGNORED)
    for part in zip(predicted.split(2), truth.split(2), strict=True):
        overlaps.add(*part)
    assert overlaps.scores() == pytest.approx(slow_scores(predicted, truth, classes, distance), abs=1e-3)
    assert len(set(overlaps.scores())) == 3


def test_square_one_pixel_too_far() -> None:
    """Boundary IoU detects errors that hardly change mIoU."""
    truth, predicted = torch.zeros(2, 1, 60, 60, dtype=torch.int64)
    truth[:, 10:50, 10:50] = 1
    predicted[:, 10:50, 11:51] = 1
    overlaps = Overlaps(2, 1, IGNORED)
    overlaps.add(predicted, truth)
    scores = overlaps.scores()
    square, rest = 39 / 41, (3600 - 41 * 40) / (3600 - 39 * 40)
    assert scores.miou == pytest.approx(50 * (square + rest))
    # Two rings of one pixel (156 and 164 pixels) share two rows (minus a pixel each), and no column.
    square, rest = 78 / (2 * 156 - 78), 82 / (2 * 164 - 82)
    assert scores.boundary == pytest.approx(50 * (square + rest))


def test_a_perfect_map_and_the_frame_of_the_image() -> None:
    truth = torch.zeros(1, 8, 8, dtype=torch.int64)
    overlaps = Overlaps(1, 2, IGNORED)
    overlaps.add(truth, truth)
    assert overlaps.scores().miou == 100
    assert math.isnan(overlaps.scores().boundary)  # A map of one class has no border.
