"""DeepGCN: parts of objects with 256 points, their neighbours, depth, and the speed of the ops."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from benchmarks.claims import parts
from benchmarks.claims.training import accuracy, parameter_count, train
from benchmarks.micro import graph_conv
from benchmarks.micro import knn as micro
from benchmarks.micro.harness import Case, Comparison, Result
from benchmarks.report.page import ACCENT, INK, MUTED, Section, claims, code, heading, picture, table, text
from benchmarks.report.speed import caption, measure, named, panels
from paper_layers.deep_gcn import DeepGCN, DilatedKNN

STEPS = 200
COLORS = (ACCENT, "#1d4ed8", "#15803d", "#a16207", "#7e22ce")  # One per class.


def network() -> nn.Module:
    return DeepGCN(6, 5, channels=16, blocks=7, k=8, max_dilation=4, order="norm_act", dropout=0.0)


def section() -> Section:
    print("\nDeepGCN: parts of objects")
    torch.manual_seed(0)
    net = network()
    seconds = train(net, parts.clouds(1000, seed=0), STEPS, seed=0, batch_size=8, progress="training")
    clouds, labels = test = parts.clouds(200, seed=10_000)
    row = (f"{parameter_count(net):,}", f"{accuracy(net, test):.1f} %", f"{seconds:.0f} s")
    head = ("parameters", "points labelled rightly", "training")
    scores = table(head, [row])
    results = measure("DeepGCN: its ops alone", *_comparisons())
    return Section(
        "DeepGCN: deep networks on point clouds and graphs",
        [
            text(
                "Each layer of a graph network lets points look at their neighbours. Residual connections let it be "
                "tens of layers deep, and dilated neighbours, every d-th of the nearest, let it look further "
                "(Li, Müller, Thabet and Ghanem, ICCV 2019)."
            ),
            code(inspect.getsource(network)),
            heading("What is part of what"),
            text(
                "Objects of four primitives, scanned as 256 points with coordinates and normals. Which primitive does "
                f"each point belong to? {STEPS} steps of eight objects; the test objects are new."
            ),
            scores,
            picture(
                _parts_picture(net, clouds[:4], labels[:4]),
                "Test objects, and below each what the network says of it.",
            ),
            picture(
                _neighbors_picture(net, clouds[0]),
                "The eight neighbours of one point: the nearest, every fourth of the nearest, and every fourth in the "
                "features of the last layer, among which the dynamic graph is made.",
            ),
            *_claims(),
            heading("Speed"),
            picture(panels(results, _speed_title, 1, same=False), caption(results)),
        ],
    )


@torch.no_grad()
def _parts_picture(net: nn.Module, clouds: Tensor, labels: Tensor) -> Figure:
    answers = net.eval()(clouds).argmax(-1)
    figure = Figure(figsize=(9.5, 4.9))
    for row, (name, classes) in enumerate((("truth", labels), ("network", answers))):
        for column, (cloud, kinds) in enumerate(zip(clouds, classes, strict=True)):
            axes = _cloud_axes(figure, 2, len(clouds), row * len(clouds) + column + 1)
            axes.scatter(*cloud[:, :3].T, c=[COLORS[kind] for kind in kinds], s=9, depthshade=False)
            right = 100 * (kinds == labels[column]).float().mean()
            axes.set_title(name if row == 0 else f"{name}: {right:.0f} %", fontsize=9, loc="center", y=0.98)
    figure.legend(
        handles=[Patch(color=color, label=kind) for kind, color in zip(parts.CLASSES, COLORS, strict=True)],
        loc="lower center",
        ncols=len(COLORS),
        frameon=False,
    )
    figure.subplots_adjust(0, 0.06, 1, 0.96, 0, 0.1)
    return figure


@torch.no_grad()
def _neighbors_picture(net: nn.Module, cloud: Tensor) -> Figure:
    last = net.eval().features(cloud)[:, -16:]
    graphs = {
        "dilation 1": DilatedKNN(8)(cloud[:, :3]),
        "dilation 4": DilatedKNN(8, 4)(cloud[:, :3]),
        "dilation 4, among features": DilatedKNN(8, 4)(last),
    }
    point = int(cloud[:, 2].argmax())  # The highest.
    figure = Figure(figsize=(9.5, 3.3))
    for number, (name, index) in enumerate(graphs.items(), 1):
        axes = _cloud_axes(figure, 1, len(graphs), number)
        axes.scatter(*cloud[:, :3].T, color=MUTED, s=7, depthshade=False, alpha=0.6)
        for neighbor in index[point, 1:].tolist():
            axes.plot(*cloud[[point, neighbor], :3].T, color=ACCENT, linewidth=0.9)
        axes.scatter(*cloud[index[point, 1:], :3].T, color=ACCENT, s=22, depthshade=False)
        axes.scatter(*cloud[[point], :3].T, color=INK, s=34, depthshade=False)
        axes.set_title(name, loc="center", y=0.98)
    figure.subplots_adjust(0, 0, 1, 0.94, 0, 0)
    return figure


def _cloud_axes(figure: Figure, rows: int, columns: int, number: int) -> Any:
    axes = figure.add_subplot(rows, columns, number, projection="3d")
    axes.set_axis_off()
    axes.set(xlim=(-0.75, 0.75), ylim=(-0.75, 0.75), zlim=(-0.75, 0.75), aspect="equal")
    axes.set_box_aspect((1, 1, 1), zoom=1.2)
    axes.view_init(elev=18, azim=-60)
    return axes


def _claims() -> list[str]:
    """Show the paper's claims, if the benchmark's results exist."""
    if not (found := claims("deep_gcn")):
        return []
    return [
        heading("Depth, and neighbours"),
        picture(
            _claims_picture(found["results"]),
            f"Accuracy, %, mean and standard deviation of {found['seeds']} seeds after {found['steps']} steps each: "
            f"not of this run, but of benchmarks/claims/deep_gcn.py on {found['date'][:10]}. Right: residual.",
        ),
    ]


def _claims_picture(rows: Sequence[dict[str, Any]]) -> Figure:
    depth = [row for row in rows if row["claim"] == "depth"]
    kinds = list(dict.fromkeys(row["data"] for row in depth))
    figure = Figure(figsize=(9.5, 2.9), layout="constrained")
    *left, right = figure.subplots(1, len(kinds) + 1)
    for axes, kind in zip(left, kinds, strict=True):
        for name, color in zip(dict.fromkeys(row["name"] for row in depth), (INK, ACCENT, COLORS[1]), strict=True):
            line = sorted((r for r in depth if (r["data"], r["name"]) == (kind, name)), key=lambda row: row["layers"])
            layers, means, errors = ([row[key] for row in line] for key in ("layers", "mean", "deviation"))
            axes.errorbar(layers, means, errors, label=name, color=color, marker="o", markersize=4, capsize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(layers, layers)
        axes.set_xlabel("layers")
        axes.set_title(kind)
    left[0].legend(frameon=False, fontsize=9)
    graph = [row for row in rows if row["claim"] == "graph"][::-1]  # From the bottom to the top.
    names = [row["name"].replace(", ", ",\n") for row in graph]
    right.errorbar([r["mean"] for r in graph], names, xerr=[r["deviation"] for r in graph], fmt="o", color=ACCENT)
    right.set_title(f"neighbours, {graph[0]['layers']} layers, clouds")
    right.margins(y=0.2)
    return figure


def _comparisons() -> list[Comparison]:
    edges = Case({"conv": "edge", "shape": (2, 2048, 64, 16)}, graph_conv.conv_inputs, 0, backward=True)
    searches = [micro.make_case(shape) for shape in ((8, 1024, 3, 16, 1), (1, 4096, 64, 16, 1))]
    search = named(micro.CONTENDERS, "paper_layers.knn", "cdist + topk")
    convolve = named(graph_conv.CONV_CONTENDERS, "paper_layers.deep_gcn", "official formula")
    return [Comparison(search, searches, micro.LIMIT), Comparison(convolve, [edges], graph_conv.CONV_LIMIT)]


def _speed_title(result: Result) -> str:
    b, n, c, k, *_ = result.params["shape"]
    return f"{'EdgeConv + backward' if result.backward else 'knn'}\n{b} x {n:,} points, C = {c}, k = {k}"
