"""AdvProp's claim at small scale: adversarial images help where they have batch norms of their own, and hurt where not.

The same network trained equally many steps, from the same start and on the same batches, in three ways:

- vanilla: on clean images;
- shared: on clean and adversarial images, through one set of norms;
- split: on the same, through split norms, AdvProp.

    python -m benchmarks.claims.adv_prop [--path PATH] [--seeds 8] [--steps 600] [--quick] [--json PATH]

PATH is an npz of digits with images (N, H, W) of 0 to 255 and labels; default scikit-learn's. Strengths are in grey levels.
Beside the JSON, a picture of the same name. How attacked networks do is measured with untargeted PGD on each branch.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.claims.training import Data, accuracy, in_parallel, mean_and_interval, train
from benchmarks.environment import environment, save
from paper_layers import swap
from paper_layers.adv_prop import adv_prop_loss, pgd

TRAIN = 1000  # Images; the rest are for tests.
BATCH = 50
BOUNDS = (-1, 1)
WAYS = ("vanilla", "shared", "split")
# Of the attack in training: eps, the length of a step, their number. The last is the one that the table is about.
ATTACKS = ((8.0, 3.0, 5), (76.5, 24.0, 5), (127.5, 30.0, 7))
STRENGTHS = (0, 8, 16, 32, 48, 64, 96, 128)  # Of the attack on trained networks.


def network(channels: int = 1, classes: int = 10) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, stride in ((32, 1), (64, 2), (64, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@functools.lru_cache(maxsize=1)
def datasets(path: str | None) -> tuple[Data, Data]:
    """To train and to test on, always the same: images of 8 x 8 pixels from -1 to 1."""
    if path is None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images, labels = data.images / 16, data.target
    else:
        import numpy as np

        with np.load(path) as data:
            images, labels = data["images"] / 255, data["labels"]
    pixels = F.interpolate(torch.from_numpy(images)[:, None].float(), (8, 8), mode="bilinear", antialias=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    x, y = (2 * pixels.clamp(0, 1) - 1)[order], torch.from_numpy(labels).long()[order]
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])


def _noise(x: Tensor) -> Tensor:
    return (x + 0.6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)


def _blur(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def _missing(x: Tensor) -> Tensor:
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) > 0.3
    return torch.where(kept, x, -1.0)


CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "missing pixels": _missing,
    "low contrast": lambda x: 0.25 * x,
    "moved": lambda x: F.pad(x, (1, -1, 0, 0), value=-1.0),
}


class Measured(NamedTuple):
    """Accuracies through one branch, in percent."""

    clean: float
    corrupted: float  # Mean over the corruptions.
    attacked: list[float]  # At each of the strengths.


class Outcome(NamedTuple):
    branches: list[Measured]  # Main; of the split network also the auxiliary one.
    seconds: float  # Of training.


def trained(way: str, seed: int, steps: int, attack: tuple[float, float, int], data: Data) -> nn.Module:
    torch.manual_seed(seed)
    model = network(data[0].shape[1], 1 + int(data[1].max())).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    eps, step_size, count = attack
    generator = torch.Generator().manual_seed(seed)
    make = functools.partial(pgd, eps=eps, step_size=step_size, steps=count, bounds=BOUNDS, generator=generator)

    def shared(x: Tensor, y: Tensor) -> Tensor:
        clean, adversarial = model(torch.cat([x, make(model, x, y)])).chunk(2)
        return F.cross_entropy(clean, y) + F.cross_entropy(adversarial, y)

    losses = {"vanilla": None, "shared": shared, "split": lambda x, y: adv_prop_loss(model, x, y, make)}
    if way == "split":
        swap.split_batch_norm(model)
    train(model, data, steps, seed, BATCH, loss=losses[way])
    return model


def measured(model: nn.Module, data: Data) -> Measured:
    """Of a network with plain norms."""
    x, y = data
    corrupted = [accuracy(model, (change(x), y)) for change in CORRUPTIONS.values()]
    attacked = [accuracy(model, (attacked_images(model, data, eps), y)) for eps in STRENGTHS]
    return Measured(accuracy(model, data), statistics.fmean(corrupted), attacked)


def attacked_images(model: nn.Module, data: Data, eps: float, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pgd(model, *data, eps, eps / 4, 10, targeted=False, bounds=BOUNDS, generator=generator, **options)
