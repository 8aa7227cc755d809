"""Images with small features: a whole digit on a larger canvas, among fragments of other digits and strokes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.claims.training import two_thirds

SIZE, DIGIT, FRAGMENT = 32, 12, 6  # Sides of the canvas, the digit and a fragment, in pixels.
FRAGMENTS, STROKES = 5, 2


def digits(path: str | Path | None = None, size: int = DIGIT) -> tuple[Tensor, Tensor]:
    """Load digits (N, size, size) with values in [0, 1], and labels (N,), from scikit-learn or an npz file."""
    if path is None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images, labels = data.images / 16, data.target
    else:
        with np.load(path) as data:
            images, labels = data["images"] / 255, data["labels"]
    resized = F.interpolate(torch.from_numpy(images)[:, None].float(), (size, size), mode="bilinear", antialias=True)
    return resized[:, 0].clamp(0, 1), torch.from_numpy(labels).long()


def split(images: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Split into two thirds for training and one third for tests."""
    train, test = two_thirds(len(images))
    return (images[train], labels[train]), (images[test], labels[test])


def canvases(images: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw canvases (count, 1, SIZE, SIZE), with the labels (count,) of their whole digits."""
    rng = np.random.default_rng(seed)
    source = images.numpy()
    chosen = rng.permutation(np.resize(np.arange(len(source)), count))
    canvas = np.zeros((count, SIZE, SIZE), np.float32)
    for image, index in zip(canvas, chosen, strict=True):
        for _ in range(FRAGMENTS):
            row, column = rng.integers(0, DIGIT - FRAGMENT + 1, 2)
            patch = source[rng.integers(len(source)), row : row + FRAGMENT, column : column + FRAGMENT]
            _paste(image, patch, rng)
        for _ in range(STROKES):
            _paste(image, _stroke(rng), rng)
        _paste(image, source[index], rng)
    # Channels last is the faster layout on a CPU, for every way of downsampling.
    images = torch.from_numpy(canvas)[:, None].contiguous(memory_format=torch.channels_last)
    return images, labels[torch.from_numpy(chosen)]


def _paste(image: np.ndarray, patch: np.ndarray, rng: np.random.Generator) -> None:
    row, column = rng.integers(0, SIZE - patch.shape[0] + 1), rng.integers(0, SIZE - patch.shape[1] + 1)
    place = image[row : row + patch.shape[0], column : column + patch.shape[1]]
    np.maximum(place, patch, out=place)


def _stroke(rng: np.random.Generator) -> np.ndarray:
    patch = np.zeros((DIGIT, DIGIT), np.float32)
    start, end = rng.uniform(0, DIGIT - 1, (2, 2))
    points = np.rint(start + np.linspace(0, 1, DIGIT)[:, None] * (end - start)).astype(int)
    patch[points[:, 0], points[:, 1]] = rng.uniform(0.5, 1)
    return patch
