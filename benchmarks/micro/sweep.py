"""Every op against its peers on shapes drawn at random: how many are lost, by how much, and the median.

python -m benchmarks.micro.sweep [--ops knn lip] [--shapes 150] [--seed 0] [--threads 2 1] [--quick] [--json PATH]

Sizes are log-uniform in the ranges below, from tiny to large. A shape counts as lost where our time is more than 1.05
times the best peer's and, where that takes less than 30 us, more than 10 us longer. Lost shapes are measured a second
time for longer, and the second result counts: on a shared machine, short measurements are noisy.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import paper_layers
from benchmarks import command
from benchmarks.environment import environment
from benchmarks.micro import knn, lip, point_sample, soft_triple, split_batch_norm
from benchmarks.micro.harness import Case, Comparison, Contender, Inputs, Result, compare

LARGEST = 1 << 23  # Elements of the largest tensor.
SHORT, MARGIN, SLACK = 30e-6, 10e-6, 1.05  # Seconds, seconds, ratio.
LAYOUTS, DTYPES = tuple(lip.LAYOUTS), ("float32", "float32", "bfloat16")
Params = dict[str, Any]


class Draw(random.Random):
    """Random sizes and choices."""

    def size(self, low: int, high: int) -> int:
        """Draw a log-uniform integer; both ends are possible."""
        return min(high, int(math.exp(self.uniform(math.log(low), math.log(high + 1)))))

    def sizes(self, *ranges: tuple[int, int], most: int = LARGEST) -> tuple[int, ...]:
        """Draw sizes whose product is not above `most`."""
        while True:
            drawn = tuple(self.size(*limits) for limits in ranges)
            if math.prod(drawn) <= most:
                return drawn


def draw_lip(draw: Draw) -> Params:
    shape = draw.sizes((1, 128), (1, 512), (4, 128), (4, 128))
    return {"shape": shape, "layout": draw.choice(LAYOUTS), "dtype": draw.choice(DTYPES)}


def draw_norm(draw: Draw) -> Params:
    n, c, h, w = draw.sizes((2, 256), (4, 2048), (1, 112), (1, 112))
    return {"shape": (n + n % 2, c, h, w + (n * h * w < 4)), "layout": draw.choice(LAYOUTS)}


def draw_points(draw: Draw) -> Params:
    shape = draw.sizes((1, 128), (1, 512), (4, 512), (4, 512))
    points = draw.size(16, max(16, min(16384, LARGEST // (shape[0] * shape[1]))))
    return {"shape": shape, "points": points, "layout": draw.choice(LAYOUTS), "dtype": draw.choice(DTYPES)}


def point_inputs(case: Case) -> Inputs:
    shape, layout = case.params["shape"], lip.LAYOUTS[case.params["layout"]]
    map = torch.randn(shape, device=case.device).to(getattr(torch, case.params["dtype"]))
    points = torch.rand(shape[0], case.params["points"], 2, device=case.device)
    return points, map.contiguous(memory_format=layout).requires_grad_()


def grid_sample(points: Tensor, map: Tensor) -> Tensor:
    return point_sample.grid_sample(points.to(map.dtype), map)


def draw_knn(draw: Draw) -> Params:
    while True:
        channels = 3 if draw.random() < 0.4 else draw.size(2, 640)
        b, n = draw.sizes((1, 64), (32, 8192), most=LARGEST // channels)
        k, dilation = draw.size(4, 32), draw.choice((1, 1, 2, 4))
        if b * n * n <= 2 * LARGEST and k * dilation <= n:
            return {"shape": (b, n, channels, k, dilation)}


def draw_soft_triple(draw: Draw) -> Params:
    while True:
        b, d, c, k = draw.sizes((4, 512), (8, 512), (4, 10000), (2, 10), most=1 << 40)
        if max(b * c * k, c * k * d) <= LARGEST // 2:
            return {"B, d, C, K": (b, d, c, k), "tau": 0.2}


def draw_reduce(draw: Draw) -> Params:
    while True:
        n, c = draw.sizes((16, 32768), (1, 512))
        k = draw.size(2, 32)
        if n * c * k <= 2 * LARGEST and k < n:
            return {"shape": (n, c, k)}


def reduce_inputs(case: Case) -> Inputs:
    n, c, k = case.params["shape"]
    index, _ = paper_layers.knn(
        torch.randn(n, 3, device=case.device), k=k
    )  # As graphs have it: hubs, and neighbours near by.
    return torch.randn(n, c, device=case.device).requires_grad_(), index


def reduce_ours(x: Tensor, index: Tensor) -> Tensor:
    return paper_layers.neighbor_reduce(x, index, "max")


def reduce_formula(x: Tensor, index: Tensor) -> Tensor:
    return x[index].amax(1)


@dataclass(frozen=True)
class Sweep:
    """One op: its contenders, ours first, how its shapes are drawn, and what is wanted."""

    contenders: Sequence[Contender]
    draw: Callable[[Draw], Params]
    inputs: Callable[[Case], Inputs]
    backward: tuple[bool, ...]
    medians: dict[str, float]  # Wanted median of their time over ours, by peer and, where it matters, layout.


def _named(contenders: Sequence[Contender], *names: str) -> list[Contender]:
    """Return these contenders, which all count as peers but the first."""
    found = {contender.name: contender for contender in contenders}
    return [found[names[0]], *(replace(found[name], role="peer") for name in names[1:])]


NORMS = _named(split_batch_norm.CONTENDERS, split_batch_norm.OURS, split_batch_norm.TORCH, split_batch_norm.TIMM)
SWEEPS = {
    "knn": Sweep(
        _named(knn.CONTENDERS, "paper_layers.knn", "cdist + topk", "official formula"),
        draw_knn, knn.inputs, (False,), {"best": 3.0},
    ),
    "lip": Sweep(_named(lip.CONTENDERS, lip.OURS, lip.FORMULA), draw_lip, lip.inputs, (False, True), {"best": 3.0}),
    "neighbor_reduce": Sweep(
        (Contender("paper_layers.neighbor_reduce", reduce_ours, "ours"), Contender("formula", reduce_formula, "peer")),
        draw_reduce, reduce_inputs, (False, True), {"best": 3.0},
    ),
    "point_sample": Sweep(
        (point_sample.CONTENDERS[0], Contender(point_sample.PEER, grid_sample, "peer")),
        draw_points, point_inputs, (False, True), {"best": 3.0},
    ),
    "soft_triple": Sweep(
        (soft_triple.OURS, soft_triple.BLOCK_WISE), draw_soft_triple, soft_triple.inputs, (True,), {"best": 2.0},
    ),
    "split_batch_norm": Sweep(
        NORMS, draw_norm, split_batch_norm.inputs, (True,),
        {
            f"{split_batch_norm.TORCH} NCHW": 1.3, f"{split_batch_norm.TIMM} NCHW": 2.0,
            f"{split_batch_norm.TORCH} channels_last": 1.0, f"{split_batch_norm.TIMM} channels_last": 1.5,
        },
    ),
}  # fmt: skip


def cases(sweep: Sweep, count: int, seed: int) -> list[Case]:
    """Draw the shapes of an op; forward and forward with backward alternate."""
    draw = Draw(seed)
    ways = itertools.cycle(sweep.backward)
    return [Case(sweep.draw(draw), sweep.inputs, 4096, next(ways), memory=False) for _ in range(count)]


def measure(sweep: Sweep, drawn: Sequence[Case], threads: int, quick: bool) -> list[Result]:
    """Measure all shapes, and the lost ones again."""
    rounds, seconds = (2, 0.02) if quick else (3, 0.04)
    results = compare(Comparison(sweep.contenders, drawn, rounds=rounds, seconds=seconds), threads)
    doubtful = {(row["shape"], row["backward"]) for row in summary_rows(results) if row["lost"]}
    again = [case for case in drawn if (str(case.params), case.backward) in doubtful]
    second = compare(Comparison(sweep.contenders, again, rounds=3 * rounds, seconds=2 * seconds), threads)
    replaced = {(str(r.params), r.backward, r.contender): r for r in second}
    return [replaced.get((str(r.params), r.backward, r.contender), r) for r in results]


def summary_rows(results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """Yield for each shape: our time, each peer's ratio to it, the best peer's, and whether it is lost."""
    groups: dict[tuple[str, bool, int], list[Result]] = {}
    for result in results:
        groups.setdefault((str(result.params), result.backward, result.threads), []).append(result)
    for (shape, backward, threads), group in groups.items():
        ours = next(r for r in group if r.role == "ours")
        if ours.error:
            raise RuntimeError(f"{shape}: {ours.error}")
        peers = {r.contender: r.median for r in group if r.role == "peer" and not r.error}
        best = min(peers.values())
        limit = best + MARGIN if best < SHORT else best * SLACK
        yield {
            "shape": shape, "backward": backward, "threads": threads, "ours": ours.median, "best": best / ours.median,
            "peers": {name: time / ours.median for name, time in peers.items()}, "lost": not ours.median <= limit,
            "layout": ours.params.get("layout", ""),
        }  # fmt: skip


def summarise(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Print the share of lost shapes, the worst ratios and the medians of an op, and return them."""
    lost = [row for row in rows if row["lost"]]
    worst = min(rows, key=lambda row: row["best"])
    print(f"\n{name}: {len(rows)} shapes, lost {len(lost)} ({100 * len(lost) / len(rows):.1f} %)")
    for row in sorted(lost, key=lambda row: row["best"]) or [worst]:
        kind = "forward+backward" if row["backward"] else "forward"
        print(f"  {row['best']:.2f} x {row['ours'] * 1e6:9.1f} us, {row['threads']} threads, {kind}, {row['shape']}")
    medians = {}
    for key, wanted in SWEEPS[name].medians.items():
        peer, _, layout = key.rpartition(" ") if key.endswith(LAYOUTS) else (key, "", "")
        chosen = [row for row in rows if row["layout"] == layout or not layout]
        found = statistics.median(row["best"] if peer == "best" else row["peers"][peer] for row in chosen)
        verdict = "reached" if found >= wanted else "MISSED"
        print(f"  median of {key}: {found:.2f} times our time, wanted {wanted}: {verdict}")
        medians[key] = {"median": found, "wanted": wanted}
    return {"shapes": len(rows), "lost": len(lost), "worst": worst, "medians": medians}


def picture(rows: dict[str, list[dict[str, Any]]]) -> Any:
    """Draw each op's ratios over the best peer's time."""
    from matplotlib.figure import Figure

    figure = Figure((4 * len(rows), 3.5), layout="constrained")
    for axes, (name, shapes) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        times = [row["best"] * row["ours"] * 1e6 for row in shapes]
        axes.scatter(times, [row["best"] for row in shapes], s=8, c=["C3" if row["lost"] else "C0" for row in shapes])
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=name, xlabel="best peer, us", ylabel="times as fast as it")
    return figure


def main() -> None:
    """Measure as the command line says."""
    parser = command.parser(__doc__, "a fifth of the shapes, fewer rounds")
    parser.add_argument("--ops", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--shapes", type=int, default=150, help="shapes of each op")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="shapes are measured with each")
    options = parser.parse_args()
    content = {"benchmark": "sweep", "seed": options.seed, **environment()}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in options.ops:
        drawn = cases(SWEEPS[name], options.shapes // (5 if options.quick else 1), options.seed)
        found = [r for threads in options.threads for r in measure(SWEEPS[name], drawn, threads, options.quick)]
        rows[name] = list(summary_rows(found))
    content["summary"] = {name: summarise(name, rows[name]) for name in options.ops}
    content["rows"] = rows
    if options.json:
        command.save(options.json, content, lambda: picture(rows))


if __name__ == "__main__":
    main()
