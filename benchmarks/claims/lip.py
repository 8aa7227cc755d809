"""LIP's claim at small scale: downsampling by learned importance keeps small features that other ways lose.

The same network is trained equally long with six ways of downsampling, on digits among clutter. One is a control: LIP's
logit modules also add capacity and depth, so "max + same modules" adds the same convolutions and norms (with the same
parameter count and zero initialization) as residual branches before max pooling: features instead of importances.

    python -m benchmarks.claims.lip [--data digits.npz] [--seeds 5] [--steps 400] [--quick] [--json PATH]
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims import canvas
from benchmarks.claims.command import Options, data_name, main
from benchmarks.claims.summaries import minus, plus_minus, summary
from benchmarks.claims.training import Data, accuracy, parameter_count, train
from benchmarks.command import text_table
from paper_layers import swap
from paper_layers.lip import BottleneckLogit

WIDTH = 16  # Width of LIP's bottlenecks.
TRAIN, TEST = 4000, 2000


class Residual(BottleneckLogit):
    """Add the output of the logit's convolutions, without the gate, to the input."""

    def forward(self, input: Tensor) -> Tensor:
        return input + self.head.norm(self.head.conv(self.stem(input)))


def network(pool: Callable[[int], nn.Module], stride: int = 1) -> nn.Sequential:
    """Build three stages of convolution and downsampling, a fourth convolution, global average, linear."""
    layers: list[nn.Module] = []
    before = 1
    for channels in (16, 32, 64):
        layers += [nn.Conv2d(before, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [pool(channels)]
        before = channels
    layers += [nn.Conv2d(before, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def max_pool(channels: int) -> nn.Module:
    return nn.MaxPool2d(3, stride=2, padding=1)


def same_modules_then_max(channels: int) -> nn.Module:
    return nn.Sequential(Residual(channels, WIDTH), max_pool(channels))


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "max": lambda: network(max_pool),
    "average": lambda: network(lambda channels: nn.AvgPool2d(3, stride=2, padding=1)),
    "strided convolution": lambda: network(lambda channels: nn.Identity(), stride=2),
    "SoftPool": lambda: swap.pooling(network(max_pool), logit="identity"),
    "max + same modules": lambda: network(same_modules_then_max),
    "LIP": lambda: swap.pooling(network(max_pool), hidden_channels=WIDTH),
}


@functools.lru_cache(maxsize=1)
def datasets(seed: int, path: str | None) -> tuple[Data, Data]:
    """Return training data that depend on the seed, and the same test data every time."""
    train_digits, test_digits = canvas.split(*canvas.digits(path))
    return canvas.canvases(*train_digits, TRAIN, seed), canvas.canvases(*test_digits, TEST, seed=10_000)


def run(name: str, seed: int, steps: int, path: str | None) -> tuple[float, float, int]:
    """Train one network; return its accuracy in percent, the seconds of training, and its parameters."""
    train_data, test_data = datasets(seed, path)
    torch.manual_seed(seed)
    model = VARIANTS[name]().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seconds = train(model, train_data, steps, seed)
    return accuracy(model, test_data), seconds, parameter_count(model)


def report(outcomes: dict[str, list[tuple[float, float, int]]], options: Options) -> dict[str, Any]:
    rows, lines = [], []
    reference = [score for score, _, _ in outcomes["LIP"]]
    for name, runs in outcomes.items():
        scores, seconds, counts = zip(*runs, strict=True)
        found = summary(scores, lip_minus_it=minus(reference, scores))
        mean, lead = plus_minus(found, digits=2), "" if name == "LIP" else plus_minus(found, "lip_minus_it", 2)
        row = {"name": name, "parameters": counts[0], "train_seconds": statistics.median(seconds)}
        rows.append({**row, "accuracies": found.pop("values"), **found})
        lines.append((name, f"{counts[0]:,}", f"{row['train_seconds']:.1f}", mean, lead))
    head = ("downsampling", "parameters", "train s", "accuracy, 95 % interval", "LIP minus it, paired")
    print(f"\n{text_table(head, lines)}")
    return {"data": data_name(options.path), "train": TRAIN, "test": TEST, "results": rows}


if __name__ == "__main__":
    path = ("--data", "npz with images (N, 28, 28) and labels; default scikit-learn's")
    main(run, lambda options: [*VARIANTS], report, doc=__doc__, seeds=5, steps=400, path=path)
