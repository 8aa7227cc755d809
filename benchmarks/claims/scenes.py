"""Scenes of thin and curved shapes with label maps, or images and label maps from a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.claims.training import two_thirds

CLASSES = ("background", "digit", "line")  # Lines include curves and rings.
SIZE, SHAPES = 128, 6  # Height and width of a scene, and its number of shapes.
IGNORED = 255  # Label of ignored pixels.
_FINE = 4  # Factor of the larger grid on which strokes are drawn.

Scenes = tuple[Tensor, Tensor]  # Images (N, C, SIZE, SIZE), values from 0 to 1; labels (N, SIZE, SIZE).


def digits(path: str | Path | None = None) -> Tensor:
    """Load digits (N, H, W), values from 0 to 1, from an npz file or scikit-learn's (8 x 8)."""
    if path is not None:
        with np.load(path) as data:
            return torch.from_numpy(data["images"]).float() / 255
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images).float() / 16


def split(glyphs: Tensor) -> tuple[Tensor, Tensor]:
    """Split into two thirds for training and one third for tests."""
    train, test = two_thirds(len(glyphs))
    return glyphs[train], glyphs[test]


def scenes(glyphs: Tensor, count: int, seed: int) -> Scenes:
    """Draw scenes: shapes of random place, size, angle and tone on a textured background, later ones on top."""
    rng, source = np.random.default_rng(seed), glyphs.numpy()
    shapes: list[tuple[str, Callable[[], np.ndarray]]] = [
        ("digit", lambda: _digit(source[rng.integers(len(source))], rng)),
        ("line", lambda: _stroke(_curve(rng), rng)),
        ("line", lambda: _stroke(_ring(rng), rng)),
    ]
    images, labels = np.empty((count, SIZE, SIZE), np.float32), np.zeros((count, SIZE, SIZE), np.int64)
    for image, label in zip(images, labels, strict=True):
        tone = rng.uniform(0.35, 0.65)
        image[:] = tone + _texture(rng)
        for kind in rng.integers(len(shapes), size=SHAPES):
            name, draw = shapes[kind]
            cover = draw()
            contrast = rng.choice([-1, 1]) * rng.uniform(0.2, 0.35)
            image += cover * (tone + contrast + _texture(rng) - image)
            label[cover >= 0.5] = CLASSES.index(name)
        image += 0.04 * rng.standard_normal(image.shape, np.float32)
    # Channels last is the faster layout on a CPU.
    tensor = torch.from_numpy(images.clip(0, 1))[:, None].contiguous(memory_format=torch.channels_last)
    return tensor, torch.from_numpy(labels)


def folder(path: str | Path) -> tuple[Scenes, Scenes]:
    """Split the images in path/images into two thirds for training and one third for tests.

    Each has a label map of the same stem in path/labels, with one channel: the class of each pixel, or 255 to ignore
    it. Both are cropped to the middle square and resized.
    """
    found = sorted(file for file in (Path(path) / "images").iterdir() if not file.name.startswith("."))
    maps = {file.stem: file for file in (Path(path) / "labels").iterdir()}
    images, labels = [], []
    for file in found:
        if file.stem not in maps:
            raise FileNotFoundError(f"{file}: expected a label map {file.stem}.* in {Path(path) / 'labels'}")
        with Image.open(file) as image, Image.open(maps[file.stem]) as label:
            if label.mode not in ("L", "P", "I", "I;16"):
                raise ValueError(f"{maps[file.stem]}: expected one channel, got mode {label.mode}")
            images.append(np.asarray(_square(image.convert("RGB"), Image.Resampling.BILINEAR)) / np.float32(255))
            labels.append(np.asarray(_square(label, Image.Resampling.NEAREST)).astype(np.int64))
    inputs = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # In channels_last.
    targets = torch.from_numpy(np.stack(labels))
    train, test = two_thirds(len(inputs))
    return (inputs[train], targets[train]), (inputs[test], targets[test])


def _square(image: Image.Image, how: Image.Resampling) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), how)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Draw smooth noise of two scales."""
    noise = (Image.fromarray(rng.normal(0, 0.05, (side, side)).astype(np.float32)) for side in (6, 24))
    return sum(np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for part in noise)


# --- shapes: the covered share of each pixel, (SIZE, SIZE)


def _digit(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Enlarge smoothly, with borders as sharp as the strokes'."""
    glyph = np.pad(glyph, 1)
    side, angle = rng.uniform(40, 80), rng.uniform(-0.6, 0.6)
    x, y = rng.uniform(0.15 * SIZE, 0.85 * SIZE, 2)
    scale = len(glyph) / side
    cos, sin, middle = scale * np.cos(angle), scale * np.sin(angle), len(glyph) / 2
    place = (cos, -sin, middle - cos * x + sin * y, sin, cos, middle - sin * x - cos * y)
    kind, how = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    value = np.asarray(Image.fromarray(glyph).transform((SIZE, SIZE), kind, place, how))
    return ((value - 0.5) / scale + 0.5).clip(0, 1)


def _curve(rng: np.random.Generator) -> np.ndarray:
    """Draw two waves along a line: points (x, y) in pixels."""
    along = np.linspace(-0.5, 0.5, 256)
    across = sum(rng.uniform(0.05, 0.2) * np.sin(n * np.pi * along + rng.uniform(0, 2 * np.pi)) for n in (2, 4))
    return _placed(np.stack([along, across], 1) * rng.uniform(40, 110), rng)


def _ring(rng: np.random.Generator) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 257)
    axes = rng.uniform(7, 22, 2)
    return _placed(np.stack([np.cos(angle), np.sin(angle)], 1) * axes, rng)


def _placed(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cos, sin = np.cos(angle := rng.uniform(0, 2 * np.pi)), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]]) + rng.uniform(0.15 * SIZE, 0.85 * SIZE, 2)


def _stroke(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a line through the points, 2 to 5 pixels wide."""
    image = Image.new("L", (_FINE * SIZE, _FINE * SIZE))
    width = round(_FINE * rng.uniform(2, 5))
    ImageDraw.Draw(image).line((_FINE * points).ravel().tolist(), 255, width)
    return np.asarray(image.reduce(_FINE), np.float32) / 255
