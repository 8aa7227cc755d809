"""AdvProp's claim at small scale: adversarial images hurt clean accuracy less where they have batch norms of their own.

The same network trained equally many steps, from the same start and on the same batches, in three ways:

- vanilla: clean images;
- shared: clean and adversarial images, one set of norms;
- split: clean and adversarial images, split norms (AdvProp).

Results (benchmarks/results/claims_adv_prop.json): with strong attacks in training, shared norms lose 0.9 and 1.6
points of clean accuracy, and split norms regain 0.85 and 1.3 of them, but don't exceed vanilla. With a weak attack
nothing differs. On corrupted and attacked images shared norms are best, and the main norms of a split network lie
between shared norms and vanilla. The auxiliary norms are close to the shared norms, except after the strongest attack,
where they lose 10 points of clean accuracy.

    python -m benchmarks.claims.adv_prop [--path PATH] [--seeds 8] [--steps 300] [--quick] [--json PATH]

PATH is an npz of digits with images (N, H, W) of 0 to 255 and labels; default scikit-learn's. Attacks are targeted in
training and untargeted in tests, which attack each branch separately; strengths are in grey levels. A plot of
accuracy by strength is saved beside the JSON, under the same name.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.claims import canvas
from benchmarks.claims.command import Options, data_name, main
from benchmarks.claims.summaries import minus, plus_minus, summary
from benchmarks.claims.training import Data, accuracy, train
from benchmarks.command import text_table
from paper_layers import swap
from paper_layers.adv_prop import adv_prop_loss, pgd

TRAIN = 1000  # Training images; the rest are for tests.
BATCH = 50
BOUNDS = (-1, 1)
# Attacks in training, from weak to strong: eps, step size, number of steps.
Attack = tuple[float, float, int]
ATTACKS: tuple[Attack, ...] = ((8.0, 3.0, 5), (76.5, 24.0, 5), (127.5, 30.0, 7))
STRENGTHS = (8, 16, 32, 48, 64, 96)  # Strengths of the untargeted attack on trained networks, with 10 steps.
SHOWN = (16, 32, 64)  # In the table.
STYLES = (("#78716c", "-"), ("#1d4ed8", "-"), ("#c2410c", "-"), ("#c2410c", "--"))


def network(channels: int = 1, classes: int = 10) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, stride in ((32, 1), (64, 2), (64, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@functools.lru_cache(maxsize=1)
def datasets(path: str | None) -> tuple[Data, Data]:
    """Return the same training and test images every time: 8 x 8 pixels from -1 to 1."""
    images, labels = canvas.digits(path, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = (2 * images[:, None] - 1)[order], labels[order]
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
    """Accuracies of one branch, in percent."""

    clean: float
    corrupted: float  # Mean over the corruptions.
    attacked: list[float]  # At each strength.


class Outcome(NamedTuple):
    branches: list[Measured]  # The main branch, and the auxiliary branch if the network is split.
    seconds: float  # Of training.


def trained(way: str, attack: Attack, seed: int, steps: int, data: Data, progress: str | None = None) -> nn.Module:
    torch.manual_seed(seed)
    model = network(data[0].shape[1], 1 + int(data[1].max())).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    eps, step_size, count = attack
    generator = torch.Generator().manual_seed(seed)
    images = functools.partial(pgd, radius=eps, step_size=step_size, steps=count, bounds=BOUNDS, generator=generator)

    def shared(x: Tensor, y: Tensor) -> Tensor:
        clean, adversarial = model(torch.cat([x, images(model, x, y)])).chunk(2)
        return F.cross_entropy(clean, y) + F.cross_entropy(adversarial, y)

    def split(x: Tensor, y: Tensor) -> Tensor:
        return adv_prop_loss(model, x, y, images)

    if way == "split":
        swap.split_batch_norm(model)
    train(model, data, steps, seed, BATCH, progress, {"vanilla": None, "shared": shared, "split": split}[way])
    return model


def attacked_images(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    attack = functools.partial(pgd, radius=eps, step_size=eps / 4, steps=10, targeted=False, bounds=BOUNDS)
    return attack(model, x, y, generator=generator)


def measured(model: nn.Module, data: Data) -> Measured:
    """Return the accuracies of a network with plain norms."""
    x, y = data
    corrupted = statistics.fmean(accuracy(model, (change(x), y)) for change in CORRUPTIONS.values())
    attacked = [accuracy(model, (attacked_images(model, x, y, eps), y)) for eps in STRENGTHS]
    return Measured(accuracy(model, data), corrupted, attacked)


def branches(model: nn.Module, way: str) -> list[nn.Module]:
    """Return the plain networks of its branches: one, or the main and the auxiliary one."""
    if way != "split":
        return [model]
    return [swap.plain_batch_norm(copy.deepcopy(model), number) for number in (0, 1)]


def run(network: tuple[str, Attack], seed: int, steps: int, path: str | None) -> Outcome:
    way, attack = network
    train_data, test_data = datasets(path)
    start = time.perf_counter()
    model = trained(way, attack, seed, steps, train_data)
    seconds = time.perf_counter() - start
    return Outcome([measured(plain, test_data) for plain in branches(model, way)], seconds)


# --- reports


def rows(outcomes: dict[tuple[str, Attack], list[Outcome]]) -> list[dict[str, Any]]:
    """Return each branch's accuracies, and their differences from other networks with the same seeds."""
    vanilla = [outcome.branches[0].clean for outcome in outcomes["vanilla", ATTACKS[-1]]]
    found = []
    for (way, attack), runs in outcomes.items():
        for number in range(len(runs[0].branches)):
            parts = [outcome.branches[number] for outcome in runs]
            row: dict[str, Any] = {"way": way, "branch": ("main", "auxiliary")[number]}
            if way != "vanilla":
                row |= dict(zip(("eps", "step_size", "attack_steps"), attack, strict=True))
            row["train_seconds"] = statistics.median(outcome.seconds for outcome in runs)
            clean = [part.clean for part in parts]
            row["clean"] = summary(clean)
            row["corrupted"] = summary([part.corrupted for part in parts])
            row["attacked"] = [summary(values) for values in zip(*(part.attacked for part in parts), strict=True)]
            row["clean_minus_vanilla"] = summary(minus(clean, vanilla))
            if way == "split":
                shared = [outcome.branches[0].clean for outcome in outcomes["shared", attack]]
                row["clean_minus_shared"] = summary(minus(clean, shared))
            found.append(row)
    return found


def table(found: list[dict[str, Any]]) -> str:
    head = ("training", "eps", "branch", "train s", "clean", "- vanilla", "- shared", "corrupted")
    lines = []
    for row in found:
        values = [row["clean"], row["clean_minus_vanilla"], row.get("clean_minus_shared"), row["corrupted"]]
        values += [row["attacked"][STRENGTHS.index(eps)] for eps in SHOWN]
        texts = ["" if value is None else plus_minus(value, digits=2) for value in values]
        lines.append([row["way"], str(row.get("eps", 0)), row["branch"], f"{row['train_seconds']:.1f}", *texts])
    return text_table((*head, *(f"eps {eps:g}" for eps in SHOWN)), lines)


def draw(axes: Any, curves: dict[str, Sequence[float]]) -> None:
    """Plot accuracy by the attack's strength."""
    for (name, values), (color, style) in zip(curves.items(), STYLES, strict=False):
        axes.plot((0, *STRENGTHS), values, style, color=color, label=name, marker="o", markersize=3.5)
    axes.set(xlabel="eps of the attack, grey levels", ylabel="accuracy, %", ylim=(0, 102))
    axes.legend(frameon=False)


def picture(outcomes: dict[tuple[str, Attack], list[Outcome]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, attack in zip(figure.subplots(1, len(ATTACKS), sharey=True), ATTACKS, strict=True):
        chosen = [row for row in rows(outcomes) if row.get("eps", attack[0]) == attack[0]]
        names = [row["way"] if row["way"] != "split" else f"split, {row['branch']}" for row in chosen]
        values = [[one["mean"] for one in (row["clean"], *row["attacked"])] for row in chosen]
        draw(axes, dict(zip(names, values, strict=True)))
        axes.set_title(f"trained with eps {attack[0]:g}, {attack[2]} steps")
        axes.label_outer()
    return figure


def report(outcomes: dict[tuple[str, Attack], list[Outcome]], options: Options) -> dict[str, Any]:
    found = rows(outcomes)
    print(f"\n{table(found)}")
    setup = {"data": data_name(options.path), "train": TRAIN, "test": len(datasets(options.path)[1][1]), "batch": BATCH}
    return {**setup, "corruptions": [*CORRUPTIONS], "strengths": STRENGTHS, "results": found}


def cells(options: Options) -> list[tuple[str, Attack]]:
    return [("vanilla", ATTACKS[-1]), *((way, attack) for attack in ATTACKS for way in ("shared", "split"))]


if __name__ == "__main__":
    path = ("--path", "npz of images and labels; default scikit-learn's digits")
    main(run, cells, report, doc=__doc__, seeds=8, steps=300, path=path, picture=picture)
