"""PointRend: thin shapes in scenes, the points it refines, borders before and after, and its speed."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Sequence

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from torch import Tensor

from benchmarks.claims import scenes
from benchmarks.claims.point_rend import BATCH, DISTANCE, OURS, Bilinear, PointRend, network, scores
from benchmarks.claims.segmentation import Scores
from benchmarks.claims.training import Data, in_parallel, train
from benchmarks.micro import point_rend as micro
from benchmarks.micro.harness import Case, Result, compare
from benchmarks.micro.harness import table as benchmark_table
from demo.report import MUTED, Section, bars, code, heading, picture, table, text
from paper_layers.point_rend import draw_steps

NETWORKS = ("bilinear", OURS)
STEPS = 400
TRAIN, TEST = 400, 60  # Scenes.
COLORS = ("#fdfcfa", "#1d4ed8", "#15803d")  # Of the classes.
WRONG = "#e11d48"


def test_scenes(count: int) -> Data:
    """The first so many."""
    return scenes.scenes(scenes.split(scenes.digits())[1], count, seed=10_000)


def run(way: str) -> tuple[Bilinear, Scores, float]:
    """The trained network, its scores, the seconds that training took."""
    train_data = scenes.scenes(scenes.split(scenes.digits())[0], TRAIN, seed=0)
    torch.manual_seed(0)
    model = network(way, 1, len(scenes.CLASSES))
    start = time.perf_counter()
    train(model, train_data, STEPS, 0, BATCH, loss=model.loss)
    seconds = time.perf_counter() - start
    return model, scores(model, test_scenes(TEST), len(scenes.CLASSES)), seconds


def section() -> Section:
    print("\nPointRend: thin shapes in scenes, with the coarse map enlarged and refined")
    outcomes = dict(zip(NETWORKS, in_parallel(run, [(way,) for way in NETWORKS], "training"), strict=True))
    rows = [
        (way, *(f"{score:.1f} %" for score in found), f"{seconds:.0f} s")
        for way, (_, found, seconds) in outcomes.items()
    ]
    head = ("network", "mIoU", f"mIoU within {DISTANCE} pixels of borders", "boundary IoU", "training")
    print("\n".join("{:12}{:>10}{:>36}{:>16}{:>12}".format(*row) for row in (head, *rows)))

    print("\nPointRend: refinement alone, in milliseconds")
    results = _measure()
    print(benchmark_table(results))
    images, labels = test_scenes(5)
    models = {way: model for way, (model, _, _) in outcomes.items()}
    return Section(
        "PointRend: segmentation as rendering",
        [
            text(
                "A segmentation network labels a map that is much smaller than the image, and enlarging it blurs what "
                "is thin. As renderers do, PointRend computes where it matters: step by step the map doubles, and only "
                "its most uncertain pixels are predicted anew, from fine features, by a small network "
                "(Kirillov, Wu, He and Girshick, CVPR 2020)."
            ),
            code(f"{inspect.getsource(Bilinear)}\n\n{inspect.getsource(PointRend)}"),
            heading("Where it looks"),
            picture(
                _steps_picture(models[OURS], images[:1]),
                "A test scene, the coarse map, and the maps of the refinement with the points that were predicted.",
            ),
            heading("Borders"),
            text(
                f"Scikit-learn's digits, and lines. The same coarse network and {STEPS} steps of {BATCH} scenes "
                f"for both; the {TEST} test scenes have other digits. benchmarks/claims/point_rend.py has more seeds, "
                "and a network that predicts every pixel."
            ),
            table(head, rows),
            picture(
                _borders_picture(models, images, labels),
                "Test scenes, and the classes that both networks see. Wrong pixels are red.",
            ),
            heading("Speed"),
            picture(
                _speed_picture(results), f"Milliseconds, median of interleaved rounds; {results[0].threads} threads."
            ),
        ],
    )


@torch.no_grad()
def _steps_picture(net: Bilinear, image: Tensor) -> Figure:
    assert isinstance(net, PointRend)
    coarse, fine = net.eval().backbone(image)
    return draw_steps(net.refine.steps(coarse, fine, image.shape[2:]), image=image[0])


@torch.no_grad()
def _borders_picture(models: dict[str, Bilinear], images: Tensor, labels: Tensor) -> Figure:
    answers = {name: model.eval()(images).argmax(1) for name, model in models.items()}
    figure = Figure(figsize=(9.5, 7))
    grid = figure.subplots(2 + len(models), len(images), gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for axes, image in zip(grid[0], images[:, 0], strict=True):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
    colors = ListedColormap([*COLORS, WRONG])
    for line, found in zip(grid[1:], (labels, *answers.values()), strict=True):
        for axes, answer, truth in zip(line, found, labels, strict=True):
            shown = answer.where(answer == truth, len(COLORS))
            axes.imshow(shown, cmap=colors, vmin=-0.5, vmax=len(COLORS) + 0.5, interpolation="nearest")
            if found is not labels:
                wrong = f"{(answer != truth).sum():,} wrong"
                axes.text(0.98, 0.03, wrong, transform=axes.transAxes, ha="right", fontsize=8)
    for line, name in zip(grid, ("scene", "truth", *models), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(visible=True, color=MUTED)
    handles = [Patch(color=color, label=name) for name, color in zip(scenes.CLASSES[1:], COLORS[1:], strict=True)]
    handles.append(Patch(color=WRONG, label="wrong"))
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.04), ncols=len(handles), frameon=False)
    return figure


def _measure() -> list[Result]:
    threads = min(2, os.cpu_count() or 1)
    boxes = {"masks of": "boxes", "boxes": 8, "side": 224}
    large = {"map": "semantic", "coarse": (1, 19, 64, 128), "steps": 2}
    cases = [
        (micro.MASK_CONTENDERS, Case(boxes, micro.mask_inputs, 4 * 256 * 200 * 304, backward=False)),
        (micro.SEMANTIC_CONTENDERS, Case(large, micro.semantic_inputs, 8 * 19 * 256 * 512, backward=False)),
    ]
    found = []
    for contenders, case in cases:
        chosen = [c for c in contenders if c.name in (micro.OURS, micro.OFFICIAL, micro.PLAIN)]
        found += compare(chosen, [case], threads, rounds=3, seconds=0.1)
    return found


def _speed_picture(results: Sequence[Result]) -> Figure:
    titles = {"masks of": "masks of 8 boxes, 7 to 224 pixels, 80 classes", "map": "map of 19 classes, to 256 x 512"}
    figure = Figure(figsize=(9.5, 1.7), layout=ConstrainedLayoutEngine(w_pad=0.12))
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        rows = [r for r in results if kind in r.params and r.role != "limit" and not r.error]
        bars(axes, title, {r.contender: 1e3 * r.median for r in rows}, 0, ours=micro.OURS)
    return figure
