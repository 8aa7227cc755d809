"""PointRend's claim at small scale: maps refined at uncertain points are sharper than enlarged coarse ones.

The same coarse network is trained equally long (steps, batches, start) with three ways to get logits of the full size:

- bilinear: enlarge the coarse logits;
- PointRend: refine them at uncertain points, from features of half the size;
- dense: label every pixel with the same point head, in training and in inference.

Results (benchmarks/results/claims_point_rend.json): PointRend is far better than bilinear, most of all at the borders.
It differs from dense prediction by no more than seeds do, but dense prediction takes 5 times as long to train and, for
an image of 512 x 512 pixels, 3.5 times the time and 14 times the memory.

    python -m benchmarks.claims.point_rend [--path PATH] [--seeds 3] [--steps 400] [--quick] [--json PATH]

PATH is a folder with images/ and labels/ (see benchmarks/claims/scenes.py), or an npz of digits for the scenes, with
images (N, 28, 28). benchmarks/micro/point_rend.py measures the cost by size.
"""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.claims import scenes
from benchmarks.claims.command import Options, data_name, main
from benchmarks.claims.segmentation import Overlaps, Scores
from benchmarks.claims.summaries import minus, summary, with_leads
from benchmarks.claims.training import Data, parameter_count, train
from benchmarks.command import text_table
from benchmarks.micro.command import as_dicts
from benchmarks.micro.harness import Case, Comparison, Contender, Inputs, Result, compare
from paper_layers.point_rend import PointRendHead, PointRendSemantic

TRAIN, TEST = 800, 200  # Number of scenes.
BATCH = 8
FINE, HEAD = 16, 64  # Channels of the fine features and of the point head.
TRAIN_POINTS, POINTS = 1024, 2048  # Points of an image in training, and of a map in inference.
DISTANCE = 2  # Pixels within this distance are near a border.
SIZES = (scenes.SIZE, 4 * scenes.SIZE)  # Sides of the images in inference.


class Backbone(nn.Module):
    """Fine features of half the image's size, and coarse logits of an eighth."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.fine = nn.Sequential(_layer(channels, FINE, 2), _layer(FINE, FINE))
        layers = [_layer(FINE, 32, 2), _layer(32, 32), _layer(32, 64, 2)]
        layers += [_layer(64, 64, dilation=dilation) for dilation in (1, 2, 4)]
        self.coarse = nn.Sequential(*layers, nn.Conv2d(64, classes, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(images)
        return fine, self.coarse(fine)


def _layer(before: int, channels: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(before, channels, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class Bilinear(nn.Module):
    """Map images (N, C, H, W) to logits (N, classes, H, W); `loss` takes images and labels."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.backbone = Backbone(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return _enlarged(self.backbone(images)[1], images)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(self(images), labels)


class PointRend(Bilinear):
    def __init__(self, channels: int, classes: int):
        super().__init__(channels, classes)
        points = {"num_points": TRAIN_POINTS, "subdivision_num_points": POINTS}
        self.refine = PointRendSemantic(FINE, classes, hidden_features=HEAD, ignore_index=scenes.IGNORED, **points)

    def forward(self, images: Tensor) -> Tensor:
        return self.refine(*self.backbone(images), size=images.shape[2:])

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return sum(self.refine(*self.backbone(images), labels=labels).values())


class Dense(Bilinear):
    def __init__(self, channels: int, classes: int):
        super().__init__(channels, classes)
        self.head = PointRendHead(FINE, classes, hidden_features=HEAD, coarse_pred_each_layer=False)

    def forward(self, images: Tensor) -> Tensor:
        return self._both(images)[1]

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        coarse, dense = self._both(images)
        return _cross_entropy(coarse, labels) + _cross_entropy(dense, labels)

    def _both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        fine, coarse = (_enlarged(maps, images) for maps in self.backbone(images))
        return coarse, self.head(fine.flatten(2), coarse.flatten(2)).unflatten(2, images.shape[2:])


def _enlarged(maps: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=scenes.IGNORED)


WAYS: dict[str, type[Bilinear]] = {"bilinear": Bilinear, "PointRend": PointRend, "dense": Dense}
OURS = "PointRend"


def network(way: str, channels: int, classes: int) -> Bilinear:
    return WAYS[way](channels, classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# --- training


class Outcome(NamedTuple):
    scores: Scores
    seconds: float  # Training time.
    parameters: int


@functools.lru_cache(maxsize=1)
def datasets(path: str | None, seed: int) -> tuple[Data, Data]:
    """Return training data, drawn with the seed if scenes are made, and the same test data every time."""
    if path is not None and Path(path).is_dir():
        return scenes.folder(path)
    train_digits, test_digits = scenes.split(scenes.digits(path))
    return scenes.scenes(train_digits, TRAIN, seed), scenes.scenes(test_digits, TEST, seed=10_000)


@torch.no_grad()
def scores(model: nn.Module, data: Data, classes: int) -> Scores:
    model.eval()
    overlaps = Overlaps(classes, DISTANCE, scenes.IGNORED)
    for images, labels in zip(data[0].split(32), data[1].split(32), strict=True):
        overlaps.add(model(images).argmax(1), labels)
    return overlaps.scores()


def run(way: str, seed: int, steps: int, path: str | None) -> Outcome:
    train_data, test_data = datasets(path, seed)
    classes = 1 + max(int(labels[labels != scenes.IGNORED].max()) for _, labels in (train_data, test_data))
    torch.manual_seed(seed)
    model = network(way, train_data[0].shape[1], classes)
    seconds = train(model, train_data, steps, seed, BATCH, loss=model.loss)
    return Outcome(scores(model, test_data, classes), seconds, parameter_count(model))


# --- the cost of inference


def _inputs(way: str, case: Case) -> Inputs:
    side = case.params["side"]
    model = network(way, 1, len(scenes.CLASSES)).eval()
    if isinstance(model, PointRend):  # In proportion to the border's pixels, which grow with the side.
        model.refine.subdivision_num_points = POINTS * side // scenes.SIZE
    return model, torch.rand(1, 1, side, side).contiguous(memory_format=torch.channels_last)


def _infer(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def measure_inference(threads: int, sizes: tuple[int, ...]) -> list[Result]:
    """Measure untrained networks on single images; the cost does not depend on the weights."""
    contenders = [
        Contender(way, _infer, "ours" if way == OURS else "other", inputs=functools.partial(_inputs, way))
        for way in WAYS
    ]
    cases = [Case({"side": side}, functools.partial(_inputs, OURS), 8 * side**2, backward=False) for side in sizes]
    return compare(Comparison(contenders, cases, rounds=3), threads)


# --- reports


def row(way: str, runs: list[Outcome], ours: list[Outcome]) -> dict[str, Any]:
    """Return each score's mean and 95 % interval, and those of PointRend's lead, seed by seed."""
    found: dict[str, Any] = {"name": way, "parameters": runs[0].parameters}
    found["train_seconds"] = statistics.median(outcome.seconds for outcome in runs)
    for name in Scores._fields:
        mine, reference = ([getattr(outcome.scores, name) for outcome in part] for part in (runs, ours))
        found[name] = summary(mine, point_rend_minus_it=minus(reference, mine))
    return found


def table(rows: list[dict[str, Any]], inference: list[Result]) -> str:
    names = {"miou": "mIoU, %", "near": f"within {DISTANCE} pixels, %", "boundary": "boundary IoU, %"}
    head = [column for name in names.values() for column in (name, "PointRend -")]
    scores = [[found["name"], *with_leads(found, names, "point_rend_minus_it", OURS)] for found in rows]
    sides = sorted({r.params["side"] for r in inference})
    costs = []
    for found in rows:
        cost = {r.params["side"]: r for r in inference if r.contender == found["name"]}
        texts = [text for s in sides for text in (f"{1e3 * cost[s].median:.1f}", f"{cost[s].peak / 1e6:.1f}")]
        costs.append([found["name"], f"{found['parameters']:,}", f"{found['train_seconds']:.1f}", *texts])
    columns = ["", "parameters", "training s", *(text for s in sides for text in (f"{s} x {s}: ms", "MB"))]
    return f"{text_table(['', *head], scores)}\n\n{text_table(columns, costs)}"


def report(outcomes: dict[str, list[Outcome]], options: Options) -> dict[str, Any]:
    rows = [row(way, runs, outcomes[OURS]) for way, runs in outcomes.items()]
    inference = measure_inference(1, SIZES[:1] if options.quick else SIZES)
    print(f"\n{table(rows, inference)}")
    setup = {"data": data_name(options.path), "train": TRAIN, "test": TEST, "batch": BATCH, "distance": DISTANCE}
    setup |= {"points_in_training": TRAIN_POINTS, "points_of_a_map": POINTS}
    return {**setup, "results": rows, "inference": as_dicts(inference)}


if __name__ == "__main__":
    path = ("--path", "folder of images and label maps, or npz of digits; default scikit-learn's")
    main(run, lambda options: [*WAYS], report, doc=__doc__, seeds=3, steps=400, path=path)
