"""PointRend: scenes of thin shapes, refined points, borders before and after, and its speed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from benchmarks.claims import scenes
from benchmarks.claims.point_rend import BATCH, DISTANCE, OURS, Bilinear, PointRend, network, scores
from benchmarks.claims.segmentation import Scores
from benchmarks.claims.training import Data, in_parallel, train
from benchmarks.micro import point_rend as micro
from benchmarks.micro.harness import Case, Comparison, Result
from benchmarks.report.page import Section, code, heading, image_grid, picture, table, text
from benchmarks.report.speed import caption, measure, named, panels
from paper_layers.point_rend import draw_steps

NETWORKS = ("bilinear", OURS)
STEPS = 400
TRAIN, TEST = 400, 60  # Number of scenes.
COLORS = ("#fdfcfa", "#1d4ed8", "#15803d")  # One per class.
WRONG = "#e11d48"


def test_scenes(count: int) -> Data:
    """Draw scenes of test digits."""
    return scenes.scenes(scenes.split(scenes.digits())[1], count, seed=10_000)


def run(way: str) -> tuple[Bilinear, Scores, float]:
    """Train the network; return it, its scores, and the seconds of training."""
    train_data = scenes.scenes(scenes.split(scenes.digits())[0], TRAIN, seed=0)
    torch.manual_seed(0)
    model = network(way, 1, len(scenes.CLASSES))
    seconds = train(model, train_data, STEPS, 0, BATCH, loss=model.loss)
    return model, scores(model, test_scenes(TEST), len(scenes.CLASSES)), seconds


def section() -> Section:
    print("\nPointRend: thin shapes in scenes, with the coarse map enlarged and refined")
    outcomes = dict(zip(NETWORKS, in_parallel(run, [(way,) for way in NETWORKS], "training"), strict=True))
    rows = [
        (way, *(f"{score:.1f} %" for score in found), f"{seconds:.0f} s")
        for way, (_, found, seconds) in outcomes.items()
    ]
    head = ("network", "mIoU", f"mIoU within {DISTANCE} pixels of borders", "boundary IoU", "training")
    accuracies = table(head, rows)
    results = measure("PointRend: refinement alone", *_comparisons())
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
            accuracies,
            picture(
                _borders_picture(models, images, labels),
                "Test scenes, and the classes that both networks see. Wrong pixels are red.",
            ),
            heading("Speed"),
            picture(panels(results, _speed_title, 0, same=True), caption(results)),
        ],
    )


@torch.no_grad()
def _steps_picture(net: Bilinear, image: Tensor) -> Figure:
    assert isinstance(net, PointRend)
    fine, coarse = net.eval().backbone(image)
    return draw_steps(net.refine.steps(fine, coarse, image.shape[2:]), image=image[0])


@torch.no_grad()
def _borders_picture(models: dict[str, Bilinear], images: Tensor, labels: Tensor) -> Figure:
    answers = {name: model.eval()(images).argmax(1) for name, model in models.items()}
    look = {"cmap": ListedColormap([*COLORS, WRONG]), "vmin": -0.5, "vmax": len(COLORS) + 0.5}
    lines: list[Any] = [("scene", images[:, 0], {"cmap": "gray", "vmin": 0, "vmax": 1})]
    for name, found in {"truth": labels, **answers}.items():
        lines.append((name, found.where(found == labels, len(COLORS)), {**look, "interpolation": "nearest"}))
    figure, grid = image_grid((9.5, 7), lines, gap=(0.05, 0.05))
    for row, found in zip(grid[2:], answers.values(), strict=True):
        for axes, count in zip(row, (found != labels).sum((1, 2)), strict=True):
            axes.text(0.98, 0.03, f"{count:,} wrong", transform=axes.transAxes, ha="right", fontsize=8)
    handles = [Patch(color=color, label=name) for name, color in zip(scenes.CLASSES[1:], COLORS[1:], strict=True)]
    handles.append(Patch(color=WRONG, label="wrong"))
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.04), ncols=len(handles), frameon=False)
    return figure


def _comparisons() -> list[Comparison]:
    boxes = {"masks of": "boxes", "boxes": 8, "side": 224}
    large = {"map": "semantic", "coarse": (1, 19, 64, 128), "steps": 2}
    names = (micro.OURS, micro.OFFICIAL, micro.PLAIN)
    masks = Case(boxes, micro.mask_inputs, 4 * 256 * 200 * 304, backward=False)
    semantic = Case(large, micro.semantic_inputs, 8 * 19 * 256 * 512, backward=False)
    return [
        Comparison(named(micro.MASK_CONTENDERS, *names), [masks]),
        Comparison(named(micro.SEMANTIC_CONTENDERS, *names), [semantic]),
    ]


def _speed_title(result: Result) -> str:
    boxes = "masks of" in result.params
    return "masks of 8 boxes, 7 to 224 pixels, 80 classes" if boxes else "map of 19 classes, to 256 x 512"
