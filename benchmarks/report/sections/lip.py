"""LIP: an ordinary CNN, its pooling swapped in one line; accuracy, importance maps, speed and memory."""

from __future__ import annotations

import inspect
import statistics
from argparse import Namespace
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor, nn

from benchmarks.claims.lip import TEST, datasets
from benchmarks.claims.summaries import mean_and_interval
from benchmarks.claims.training import accuracy, in_parallel, parameter_count, train
from benchmarks.micro import lip as micro
from benchmarks.micro.harness import LIMIT, Result
from benchmarks.report.page import ACCENT, INK, MUTED, Section, bars, code, heading, image_grid, picture, table, text
from benchmarks.report.speed import caption, measure
from paper_layers import swap
from paper_layers.lip import LIPPool2d

SEEDS, STEPS = 4, 300
BEFORE, AFTER = "max pooling", "LIP"
OURS = "lip_pool2d"  # Part of the contenders' names.
Run = tuple[nn.Module, float, float]  # The trained model, its accuracy, the seconds of training.


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def swapped_cnn() -> nn.Module:
    return swap.pooling(small_cnn(), hidden_channels=16)  # The one line.


def run(name: str, seed: int) -> Run:
    train_data, test_data = datasets(seed, None)
    torch.manual_seed(seed)
    model = {BEFORE: small_cnn, AFTER: swapped_cnn}[name]().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seconds = train(model, train_data, STEPS, seed)
    return model, accuracy(model, test_data), seconds


def section() -> Section:
    print(f"\nLIP: digits among clutter, {SEEDS} trainings with each pooling")
    jobs = [(name, seed) for seed in range(SEEDS) for name in (BEFORE, AFTER)]
    outcomes = in_parallel(run, jobs, "training")
    runs = {BEFORE: outcomes[::2], AFTER: outcomes[1::2]}
    rows = [_row(name, values) for name, values in runs.items()]
    head = ("pooling", "parameters", "accuracy", "training")
    accuracies = table(head, rows)
    results = measure("LIP: the pooling alone", *micro.plan(Namespace(shapes=micro.SHAPES[:1], quick=True)))

    _, (images, labels) = datasets(0, None)
    models = {name: values[0][0] for name, values in runs.items()}
    return Section(
        "LIP: local importance-based pooling",
        [
            text(
                "Max pooling keeps the loudest pixel of a window, average pooling drowns it. LIP learns, with a small "
                "network of its own, how much each pixel matters, and averages with these weights "
                "(Gao, Wang and Wu, ICCV 2019)."
            ),
            code(f"{inspect.getsource(small_cnn)}\n\n{inspect.getsource(swapped_cnn)}"),
            heading("Accuracy before and after"),
            text(
                "Scikit-learn's digits, one on each canvas of 32 x 32 pixels, among fragments of other digits and "
                f"strokes. The same network, data and {STEPS} steps, {SEEDS} seeds. LIP's logit modules also add "
                "parameters and time: benchmarks/claims/lip.py has the control with equal parameters."
            ),
            accuracies,
            picture(
                _accuracy_picture(runs), f"Accuracy on {TEST:,} test canvases. A line joins the two networks of a seed."
            ),
            heading("What it finds important"),
            picture(
                _importance_picture(models, images[:8], labels[:8]),
                "The first eight test canvases, with the answers of both networks, and the importance in each pool of "
                "the trained network: its mean over the channels. Bright is important.",
            ),
            heading("Speed"),
            picture(
                _speed_picture(results),
                f"{_setting(results)}. {caption(results)} The dashed line is the time of copying the bytes that LIP "
                "has to read and write.",
            ),
            heading("Memory"),
            picture(
                _memory_picture(results), f"Megabytes beyond the inputs, forward and backward; {_setting(results)}."
            ),
        ],
    )


def _row(name: str, runs: Sequence[Run]) -> tuple[str, ...]:
    mean, half = mean_and_interval([score for _, score, _ in runs])
    seconds = statistics.median(time for _, _, time in runs)
    return name, f"{parameter_count(runs[0][0]):,}", f"{mean:.1f} ± {half:.1f} %", f"{seconds:.0f} s"


def _accuracy_picture(runs: dict[str, list[Run]]) -> Figure:
    figure = Figure(figsize=(7.5, 2.2))
    axes = figure.subplots()
    scores = {name: [score for _, score, _ in values] for name, values in runs.items()}
    for pair in zip(*scores.values(), strict=True):
        axes.plot(pair, range(len(pair)), color=MUTED, linewidth=1, zorder=1)
    for height, (name, values) in enumerate(scores.items()):
        mean, half = mean_and_interval(values)
        color = ACCENT if name == AFTER else INK
        axes.scatter(values, [height] * len(values), color=color, s=30, zorder=3)
        axes.errorbar(mean, height - 0.22, xerr=half, color=color, fmt="|", markersize=12, capsize=3)
        axes.annotate(f"{mean:.1f} ± {half:.1f} %", (mean, height - 0.3), ha="center", va="bottom", color=color)
    axes.set_yticks(range(len(scores)), list(scores))
    axes.set_ylim(len(scores) - 0.6, -0.75)
    axes.set_xlabel("accuracy, %; mean with 95 % interval")
    return figure


@torch.no_grad()
def _importance_picture(models: dict[str, nn.Module], images: Tensor, labels: Tensor) -> Figure:
    model = models[AFTER].eval()
    answers = {name: m.eval()(images).argmax(1).tolist() for name, m in models.items()}
    maps: list[Tensor] = []
    pools = [module for module in model.modules() if isinstance(module, LIPPool2d)]
    hooks = [
        pool.register_forward_pre_hook(lambda module, inputs: maps.append(module.importance(*inputs).mean(1)))
        for pool in pools
    ]
    model(images)
    for hook in hooks:
        hook.remove()

    look = {"cmap": "inferno", "interpolation": "nearest"}
    lines = [("canvas", images[:, 0], {**look, "cmap": "gray_r"})]
    lines += [(f"pool {i + 1}\n{m.shape[-2]} x {m.shape[-1]}", m, look) for i, m in enumerate(maps)]
    figure, grid = image_grid((9.5, 1.22 * len(lines) + 0.5), lines)
    for column, label in enumerate(labels.tolist()):
        marks = [f"{name.split()[0]} {a[column]} {'✓' if a[column] == label else '✗'}" for name, a in answers.items()]
        grid[0, column].set_title("\n".join(marks), fontsize=9, loc="center")
    return figure


def _setting(results: Sequence[Result]) -> str:
    first = results[0]
    return f"{' x '.join(map(str, first.params['shape']))}, {first.params['dtype']}"


def _speed_picture(results: Sequence[Result]) -> Figure:
    cases = list(dict.fromkeys(r.case for r in results))
    lines = (len(cases) + 1) // 2
    figure = Figure(figsize=(9.5, 2.6 * lines), layout=ConstrainedLayoutEngine(h_pad=0.12))
    for axes, case in zip(figure.subplots(lines, 2, sharey=True).flat, cases, strict=False):
        rows = [r for r in results if r.case == case and not r.error]
        timed = {r.contender: 1e3 * r.median for r in rows if r.contender != LIMIT.name}
        direction = "forward and backward" if rows[0].backward else "forward"
        bars(axes, f"{rows[0].params['layout']}, {direction}", timed, 1, OURS)
        for limit in (r for r in rows if r.contender == LIMIT.name):
            axes.axvline(1e3 * limit.median, color=INK, linestyle="--", linewidth=1)
    return figure


def _memory_picture(results: Sequence[Result]) -> Figure:
    rows = [r for r in results if r.backward and r.params["layout"] == "NCHW" and r.role != "limit" and not r.error]
    figure = Figure(figsize=(9.5, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    bars(left, "kept for the backward pass", {r.contender: r.saved / 1e6 for r in rows}, 0, OURS)
    bars(right, "peak, with output and gradients", {r.contender: r.peak / 1e6 for r in rows}, 0, OURS)
    return figure
