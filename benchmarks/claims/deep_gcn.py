"""DeepGCN's claims at small scale: depth harms only plain graph networks; dynamic, dilated graphs help.

1. Plain, residual and dense networks of 7, 14, 28 and 56 layers, on clouds of primitives and, with --path, on the
   nodes of given graphs. Without dilation, so only depth differs.
2. Residual networks of 14 layers on the clouds. Neighbours are found by coordinates once for all blocks ("fixed"), by
   each block's features ("dynamic"), with dilations 1 to 4, or with stochastic dilation.

Results (benchmarks/results/claims_deep_gcn.json): the first claim holds. The second does not at this scale: the fixed
graph is best, and dilation changes little.

All norms precede the activation, as in the first official code (order="norm_act"), and the prediction is as narrow as
the blocks; the published one would dominate such a small network.

    python -m benchmarks.claims.deep_gcn [--path graphs.npz] [--seeds 3] [--steps 160] [--quick] [--json PATH]
"""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.claims import graphs, parts
from benchmarks.claims.command import Options, main
from benchmarks.claims.training import accuracy, parameter_count, train
from benchmarks.command import text_table
from paper_layers.deep_gcn import DeepGCN, LayerOptions, Perceptron, StaticDeepGCN

CHANNELS, GROWTH, K, HIDDEN = 16, 4, 8, 64
TRAIN, TEST = 1000, 200  # Number of clouds.
BATCH = {"clouds": 4, "graphs": 32}
DEPTHS = (7, 14, 28, 56)
GRAPH_DEPTH = 14  # Layers in the second claim.


def _prediction(pooled: int, features: int, num_classes: int, dropout: float, options: LayerOptions) -> nn.Sequential:
    return nn.Sequential(
        Perceptron(pooled + features, HIDDEN, **options),
        nn.Dropout(dropout),
        Perceptron(HIDDEN, num_classes, **{**options, "act": None, "norm": None}),
    )


class CloudNet(DeepGCN):
    """DeepGCN with a narrow prediction."""

    def _add_prediction(self, num_classes: int, dropout: float, options: LayerOptions) -> None:
        self.fusion = Perceptron(self.num_features, HIDDEN, **options)
        self.prediction = _prediction(HIDDEN, self.num_features, num_classes, dropout, options)


class FixedGraphNet(CloudNet):
    """All blocks use the head's neighbours, found by coordinates."""

    def features(self, x: Tensor, *clouds: Any, **graph: Any) -> Tensor:
        return super().features(x, index=self.head.knn(x[..., :3]))


class GraphNet(StaticDeepGCN):
    """StaticDeepGCN with a narrow prediction, for a pair of features and neighbours."""

    def _add_prediction(self, num_classes: int, dropout: float, options: LayerOptions) -> None:
        self.fusion = Perceptron(self.num_features, HIDDEN, **{**options, "norm": None})
        self.prediction = _prediction(1, self.num_features, num_classes, dropout, options)

    def forward(self, graph: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(*graph)


def undilated(block: int) -> int:
    return 1


def dilated(block: int) -> int:
    """Choose neighbours among at most 32 of 256 points, like the paper's 448 of 4096."""
    return min(1 + block // 4, 4)


NETWORKS: dict[str, tuple[type[DeepGCN], dict[str, Any]]] = {
    "plain": (CloudNet, {"block": "plain"}),
    "residual": (CloudNet, {"block": "res", "dilations": undilated}),
    "dense": (CloudNet, {"block": "dense", "dilations": undilated, "growth": GROWTH}),
}
GRAPHS: dict[str, tuple[type[DeepGCN], dict[str, Any]]] = {
    "fixed": (FixedGraphNet, {"dilations": undilated}),
    "dynamic": (CloudNet, {"dilations": undilated}),
    "dynamic, dilated": (CloudNet, {"dilations": dilated}),
    "dynamic, stochastic dilation": (CloudNet, {"dilations": dilated, "stochastic": True}),
}


class Cell(NamedTuple):
    """One network on one kind of data, trained with every seed."""

    claim: str  # "depth" or "graph"
    data: str  # "clouds" or "graphs"
    name: str
    layers: int

    def network(self, in_channels: int, num_classes: int) -> nn.Module:
        kind, settings = (NETWORKS if self.claim == "depth" else GRAPHS)[self.name]
        settings = {"stochastic": False, "order": "norm_act", "dropout": 0.0, "blocks": self.layers, **settings}
        if self.data == "graphs":
            kind = GraphNet
        return kind(in_channels, num_classes, channels=CHANNELS, k=K, **settings)


class Outcome(NamedTuple):
    accuracy: float  # In percent.
    seconds: float  # Training time.
    parameters: int


clouds = functools.lru_cache(maxsize=2)(parts.clouds)
given_graphs = functools.lru_cache(maxsize=1)(graphs.load)


def run(cell: Cell, seed: int, steps: int, path: str | None) -> Outcome:
    if cell.data == "graphs":
        assert path is not None
        train_data, test_data = given_graphs(path)
        classes = int(train_data[1].dataset.values.max()) + 1
        channels = train_data[0].dataset.values.shape[1]
    else:
        train_data, test_data = clouds(TRAIN, seed), clouds(TEST, 10_000)
        channels, classes = parts.CHANNELS, len(parts.CLASSES)
    torch.manual_seed(seed)
    model = cell.network(channels, classes)
    seconds = train(model, train_data, steps, seed, BATCH[cell.data])
    return Outcome(accuracy(model, test_data), seconds, parameter_count(model))


def cells(options: Options) -> list[Cell]:
    """Return the longest trainings first, so the last ones fill the cores evenly."""
    depths, data = DEPTHS[:2] if options.quick else DEPTHS, ("clouds", "graphs") if options.path else ("clouds",)
    found = [Cell("depth", kind, name, depth) for depth in depths for kind in data for name in NETWORKS]
    found += [Cell("graph", "clouds", name, GRAPH_DEPTH) for name in GRAPHS]
    return sorted(found, key=lambda cell: -cell.layers)


def row(cell: Cell, runs: list[Outcome]) -> dict[str, Any]:
    scores = [outcome.accuracy for outcome in runs]
    return {
        **cell._asdict(),
        "parameters": runs[0].parameters,
        "train_seconds": statistics.median(outcome.seconds for outcome in runs),
        "accuracies": scores,
        "mean": statistics.fmean(scores),
        "deviation": statistics.stdev(scores) if len(scores) > 1 else 0.0,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return accuracy in percent, mean and standard deviation over the seeds."""
    found = {Cell(*(r[name] for name in Cell._fields)): f"{r['mean']:.1f} ± {r['deviation']:.1f}" for r in rows}
    depths = sorted({cell.layers for cell in found if cell.claim == "depth"})
    parts = []
    for data in sorted({cell.data for cell in found}):
        lines = [[name, *(found[Cell("depth", data, name, depth)] for depth in depths)] for name in NETWORKS]
        parts.append(text_table([f"{data}: layers", *map(str, depths)], lines))
    lines = [[name, found[Cell("graph", "clouds", name, GRAPH_DEPTH)]] for name in GRAPHS]
    parts.append(text_table([f"clouds, residual, {GRAPH_DEPTH} layers: neighbours", ""], lines))
    return "\n\n".join(parts)


def report(outcomes: dict[Cell, list[Outcome]], options: Options) -> dict[str, Any]:
    rows = [row(cell, runs) for cell, runs in outcomes.items()]
    print(table(rows))
    setup: dict[str, Any] = {"clouds": {"train": TRAIN, "test": TEST, "points": parts.POINTS}}
    setup |= {"graphs": Path(options.path).name if options.path else None, "batch": BATCH}
    return {**setup, "channels": CHANNELS, "growth": GROWTH, "k": K, "results": rows}


if __name__ == "__main__":
    path = ("--path", "npz of graphs, see benchmarks/claims/graphs.py; default the clouds alone")
    main(run, cells, report, doc=__doc__, seeds=3, steps=160, path=path)
