"""Data sets of the claims."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.claims import scenes


def test_scenes_are_repeatable_and_hold_every_class() -> None:
    glyphs = scenes.split(scenes.digits())[0]
    images, labels = scenes.scenes(glyphs, 8, seed=1)
    again, _ = scenes.scenes(glyphs, 8, seed=1)
    assert images.shape == (8, 1, scenes.SIZE, scenes.SIZE)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, again)
    assert labels.unique().tolist() == list(range(len(scenes.CLASSES)))


def test_shapes_lie_where_the_labels_say() -> None:
    """Pixels of different classes differ in tone by at least a shape's contrast minus noise."""
    images, labels = scenes.scenes(scenes.digits(), 40, seed=2)
    for image, label in zip(images[:, 0], labels, strict=True):
        assert (image[label > 0] - image[label == 0].mean()).abs().mean() > 0.1


def test_images_and_label_maps_of_a_folder(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for number in range(6):
        # Wider than high: only the middle 32 of 64 columns are used.
        label = np.full((32, 64), scenes.IGNORED, np.uint8)
        label[:, 16:48] = np.repeat([0, number], 16)
        Image.fromarray(label).save(tmp_path / "labels" / f"{number}.png")
        Image.fromarray(np.stack([label, 0 * label, 0 * label], 2)).save(tmp_path / "images" / f"{number}.png")
    train, test = scenes.folder(tmp_path)
    assert [len(part[0]) for part in (train, test)] == [4, 2]
    numbers = []
    for images, labels in (train, test):
        assert images.shape[1:] == (3, scenes.SIZE, scenes.SIZE)
        for image, label in zip(images, labels, strict=True):
            assert (label[:, : scenes.SIZE // 2] == 0).all()
            numbers.append(label[0, -1].item())
            assert (label[:, scenes.SIZE // 2 :] == numbers[-1]).all()
            assert image[0, 0, -1].item() == pytest.approx(numbers[-1] / 255, abs=1e-6)
    assert sorted(numbers) == list(range(6))

    (tmp_path / "labels" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match="expected a label map"):
        scenes.folder(tmp_path)
