"""DeepGCN's claims at small scale: depth harms plain graph networks alone; dynamic, dilated graphs help.

1. Plain, residual and dense networks of 7, 14, 28 and 56 layers, on clouds of primitives and, with --path, on the
   nodes of graphs that are given. No dilation, so that nothing but depth differs.
2. Residual networks of 14 layers on the clouds: neighbours by coordinates once for all blocks ("fixed"), by each
   block's features ("dynamic"), with dilations 1 to 4, and with stochastic ones.

What came out (benchmarks/results/claims_deep_gcn.json): the first claim shows, the second does not at this scale, where
the fixed graph is the best and dilation changes little.

All norms precede the activation, as in the first official code (order="norm_act"), and the prediction is as narrow as
the blocks: the published one would be most of such a small network.

    python -m benchmarks.claims.deep_gcn [--path graphs.npz] [--seeds 3] [--steps 160] [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.claims import graphs, parts
from benchmarks.claims.training import Data, accuracy, in_parallel, parameter_count, train
from benchmarks.environment import environment, save
from paper_layers.deep_gcn import DeepGCN, Perceptron, StaticDeepGCN

CHANNELS, GROWTH, K, HIDDEN = 16, 4, 8, 64
TRAIN, TEST = 1000, 200  # Clouds.
BATCH = {"clouds": 4, "graphs": 32}
DEPTHS = (7, 14, 28, 56)
GRAPH_DEPTH = 14  # Of the second claim.


def _prediction(pooled: int, features: int, num_classes: int, dropout: float, layer: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(
        Perceptron(pooled + features, HIDDEN, **layer),
        nn.Dropout(dropout),
        Perceptron(HIDDEN, num_classes, **{**layer, "act": None, "norm": None}),
    )


class CloudNet(DeepGCN):
    """DeepGCN with a narrow prediction."""

    def _add_prediction(self, num_classes: int, dropout: float, layer: dict[str, Any]) -> None:
        self.fusion = Perceptron(self.num_features, HIDDEN, **layer)
        self.prediction = _prediction(HIDDEN, self.num_features, num_classes, dropout, layer)


class FixedGraphNet(CloudNet):
    """The neighbours of the head, by coordinates, are those of all blocks."""

    def features(self, x: Tensor, *clouds: Any, **graph: Any) -> Tensor:
        return super().features(x, index=self.head.knn(x[..., :3]))


class GraphNet(StaticDeepGCN):
    """StaticDeepGCN with a narrow prediction, on a pair of features and neighbours."""

    def _add_prediction(self, num_classes: int, dropout: float, layer: dict[str, Any]) -> None:
        self.fusion = Perceptron(self.num_features, HIDDEN, **{**layer, "norm": None})
        self.prediction = _prediction(1, self.num_features, num_classes, dropout, layer)

    def forward(self, graph: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(*graph)


def undilated(block: int) -> int:
    return 1


def dilated(block: int) -> int:
    """At most k * dilation = 32 of 256 points, the share of the paper's 448 of 4096."""
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
    """One network on one kind of data, to be trained with every seed."""

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
    seconds: float  # Of training.
    parameters: int


@functools.lru_cache(maxsize=2)
def clouds(count: int, seed: int) -> Data:
    return parts.clouds(count, seed)


@functools.lru_cache(maxsize=1)
def given_graphs(path: str) -> tuple[Data, Data]:
    return graphs.load(path)


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
    start = time.perf_counter()
    train(model, train_data, steps, seed, BATCH[cell.data])
    seconds = time.perf_counter() - start
    return Outcome(accuracy(model, test_data), seconds, parameter_count(model))


def cells(depths: tuple[int, ...], path: str | None) -> list[Cell]:
    """The longest first, so that the last ones fill the cores evenly."""
    data = ("clouds", "graphs") if path else ("clouds",)
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
    """Accuracy in percent, mean and standard deviation over the seeds."""
    depths = sorted({r["layers"] for r in rows if r["claim"] == "depth"})
    found = {Cell(*(r[name] for name in Cell._fields)): f"{r['mean']:.1f} ± {r['deviation']:.1f}" for r in rows}
    lines = []
    for data in sorted({cell.data for cell in found}):
        lines += ["", f"{f'{data}: layers':32}" + "".join(f"{depth:>14}" for depth in depths)]
        for name in NETWORKS:
            values = [found[Cell("depth", data, name, depth)] for depth in depths]
            lines.append(f"  {name:30}" + "".join(f"{value:>14}" for value in values))
    lines += ["", f"clouds, residual, {GRAPH_DEPTH} layers: neighbours"]
    lines += [f"  {name:30}{found[Cell('graph', 'clouds', name, GRAPH_DEPTH)]:>14}" for name in GRAPHS]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="npz of graphs, see benchmarks/claims/graphs.py; default the clouds alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--quick", action="store_true", help="under a minute: does it run, rather than what comes out")
    parser.add_argument("--json", metavar="PATH", help="write all numbers there")
    options = parser.parse_args()
    depths = DEPTHS
    if options.quick:
        depths, options.seeds, options.steps = DEPTHS[:2], 2, 10

    found = cells(depths, options.path)
    jobs = [(cell, seed, options.steps, options.path) for seed in range(options.seeds) for cell in found]
    outcomes = in_parallel(run, jobs, "claims of DeepGCN")
    rows = [row(cell, outcomes[number :: len(found)]) for number, cell in enumerate(found)]
    print(table(rows))
    if options.json:
        setup = {"clouds": {"train": TRAIN, "test": TEST, "points": parts.POINTS}}
        setup |= {"graphs": Path(options.path).name if options.path else None}
        setup |= {"steps": options.steps, "batch": BATCH, "seeds": options.seeds, "threads_per_training": 1}
        setup |= {"channels": CHANNELS, "growth": GROWTH, "k": K}
        save(options.json, {"claim": (__doc__ or "").splitlines()[0], **environment(), **setup, "results": rows})


if __name__ == "__main__":
    main()
