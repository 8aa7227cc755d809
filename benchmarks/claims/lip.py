"""LIP's claim at small scale: downsampling by learned importance keeps small features that other ways lose.

The same network with six ways of downsampling, trained equally long on digits among clutter. One of them is a control:
LIP's logit modules are also capacity and depth, so "max + same modules" adds the very same convolutions and norms (with
the same parameter count and start at zero) as residual branches before max pooling: features instead of importances.

    python -m benchmarks.claims.lip [--data digits.npz] [--seeds 5] [--steps 400] [--json PATH]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.claims import canvas
from benchmarks.claims.training import Data, accuracy, in_parallel, mean_and_interval, parameter_count, train
from benchmarks.environment import environment, save
from paper_layers import swap
from paper_layers.lip import BottleneckLogit

WIDTH = 16  # Of LIP's bottlenecks.
TRAIN, TEST = 4000, 2000


class Residual(BottleneckLogit):
    """The input and, in place of its logits, what their convolutions make of it without the gate."""

    def forward(self, input: Tensor) -> Tensor:
        return input + self.head.norm(self.head.conv(self.stem(input)))


def network(pool: Callable[[int], nn.Module], stride: int = 1) -> nn.Sequential:
    """Three stages of convolution and downsampling, a fourth convolution, global average, linear."""
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
    "LIP": lambda: swap.pooling(network(max_pool), bottleneck_width=WIDTH),
}


@functools.lru_cache(maxsize=1)
def datasets(seed: int, path: str | None) -> tuple[Data, Data]:
    """To train on, of this seed, and to test on, always the same."""
    train_digits, test_digits = canvas.split(*canvas.digits(path))
    return canvas.canvases(*train_digits, TRAIN, seed), canvas.canvases(*test_digits, TEST, seed=10_000)


def run(name: str, seed: int, steps: int, path: str | None) -> tuple[float, float, int]:
    """Train one network: its accuracy in percent, the seconds that training took, its parameters."""
    train_data, test_data = datasets(seed, path)
    torch.manual_seed(seed)
    model = VARIANTS[name]().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    start = time.perf_counter()
    train(model, train_data, steps, seed)
    seconds = time.perf_counter() - start
    return accuracy(model, test_data), seconds, parameter_count(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", help="npz with images (N, 28, 28) and labels; default scikit-learn's")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", default="benchmarks/results/claims_lip.json", metavar="PATH")
    options = parser.parse_args()

    jobs = [(name, seed, options.steps, options.data) for seed in range(options.seeds) for name in VARIANTS]
    outcomes = in_parallel(run, jobs, "claims of LIP")
    by_name = {name: outcomes[index :: len(VARIANTS)] for index, name in enumerate(VARIANTS)}

    columns = f"{'parameters':>11}{'train s':>9}{'accuracy, 95 % interval':>26}{'LIP minus it, paired':>24}"
    print(f"\n{'downsampling':22}{columns}")
    rows = []
    reference = [score for score, _, _ in by_name["LIP"]]
    for name, runs in by_name.items():
        scores, seconds, counts = zip(*runs, strict=True)
        mean, half = mean_and_interval(scores)
        lead, lead_half = mean_and_interval([a - b for a, b in zip(reference, scores, strict=True)])
        time_taken = statistics.median(seconds)
        line = f"{name:22}{counts[0]:11,}{time_taken:9.1f}{f'{mean:.2f} ± {half:.2f} %':>26}"
        print(line + ("" if name == "LIP" else f"{f'{lead:+.2f} ± {lead_half:.2f}':>24}"))
        row = {"name": name, "parameters": counts[0], "train_seconds": time_taken, "accuracies": scores}
        row |= {"mean": mean, "interval": half, "lip_minus_it": lead, "lip_minus_it_interval": lead_half}
        rows.append(row)
    setup = {"data": "npz" if options.data else "scikit-learn digits", "train": TRAIN, "test": TEST}
    setup |= {"steps": options.steps, "seeds": options.seeds, "threads_per_training": 1}
    save(options.json, {"claim": (__doc__ or "").splitlines()[0], **environment(), **setup, "results": rows})


if __name__ == "__main__":
    main()
