"""Point clouds of objects made of primitives, with each point labelled by its primitive."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CLASSES = ("box", "cylinder", "sphere", "torus", "cone")
CHANNELS = 6  # Coordinates and the surface's normal.
POINTS, PIECES = 256, 4  # Points and primitives of a cloud.
NOISE = 0.01  # Standard deviation of each channel; the largest radius of an object is 1.

Surface = tuple[np.ndarray, np.ndarray]  # Evenly distributed points (count, 3), and their normals.


def clouds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw upright objects: features (count, POINTS, CHANNELS) and labels (count, POINTS)."""
    rng = np.random.default_rng(seed)
    made = [_object(rng) for _ in range(count)]
    features, labels = (np.stack(column) for column in zip(*made, strict=True))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def _object(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Place pieces so that each touches or enters the one before; only the shape shows where it ends."""
    kinds = rng.integers(0, len(CLASSES), PIECES)
    share = POINTS // PIECES
    pieces: list[np.ndarray] = []
    directions: list[np.ndarray] = []
    for kind in kinds:
        points, normals = _primitive(CLASSES[kind], share, rng)
        turn = _turn(rng)
        points = points @ turn * rng.uniform(0.6, 1.2)
        if pieces:
            points += pieces[-1][rng.integers(share)] - points[rng.integers(share)]
        pieces.append(points)
        directions.append(normals @ turn)
    points = np.concatenate(pieces)
    points -= points.mean(0)
    points /= np.linalg.norm(points, axis=1).max()
    features = np.hstack([points, np.concatenate(directions)])
    features += rng.normal(0, NOISE, features.shape)
    order = rng.permutation(POINTS)  # The order must not reveal the labels.
    return features[order], kinds.repeat(share)[order]


def _turn(rng: np.random.Generator) -> np.ndarray:
    """Rotate about the vertical axis."""
    cos, sin = np.cos(angle := rng.uniform(0, 2 * np.pi)), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def _primitive(name: str, count: int, rng: np.random.Generator) -> Surface:
    radius, height = rng.uniform(0.4, 0.8), rng.uniform(0.6, 1.0)
    angle = np.linspace(0, np.pi, 65)
    if name == "box":
        return _box(rng.uniform(0.35, 0.9, 3), count, rng)
    if name == "sphere":
        return _turned(radius * np.stack([np.sin(angle), -np.cos(angle)], 1), count, rng)
    if name == "torus":
        ring = np.stack([np.cos(2 * angle), np.sin(2 * angle)], 1)
        return _turned(np.array([radius, 0]) + 0.35 * radius * ring, count, rng)
    top = [[0, height]] if name == "cone" else [[radius, height], [0, height]]
    return _turned(np.array([[0, -height], [radius, -height], *top]), count, rng)


def _box(half: np.ndarray, count: int, rng: np.random.Generator) -> Surface:
    area = half.prod() / half
    face, sign = rng.choice(3, count, p=area / area.sum()), rng.choice([-1, 1], count)
    normals = np.eye(3)[face] * sign[:, None]
    points = rng.uniform(-half, half, (count, 3))
    return np.where(normals == 0, points, normals * half), normals


def _turned(profile: np.ndarray, count: int, rng: np.random.Generator) -> Surface:
    """Sample the surface that a line of (radius, height) makes by turning about the axis, outside on its right."""
    start, step = profile[:-1], np.diff(profile, axis=0)
    length = np.linalg.norm(step, axis=1)
    area = (start[:, 0] + step[:, 0] / 2) * length
    at = rng.choice(len(step), count, p=area / area.sum())
    # The area within a radius grows with its square.
    first, last = start[at, 0], start[at, 0] + step[at, 0]
    radius = np.sqrt(first**2 + rng.uniform(size=count) * (last**2 - first**2))
    flat = np.isclose(first, last)
    share = np.where(flat, rng.uniform(size=count), (radius - first) / np.where(flat, 1, last - first))
    height = start[at, 1] + share * step[at, 1]
    outside = np.stack([step[at, 1], -step[at, 0]], 1) / length[at, None]
    turn = rng.uniform(0, 2 * np.pi, count)
    cos, sin = np.cos(turn), np.sin(turn)
    return (
        np.stack([radius * cos, radius * sin, height], 1),
        np.stack([outside[:, 0] * cos, outside[:, 0] * sin, outside[:, 1]], 1),
    )
