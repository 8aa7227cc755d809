"""Time of an exact search in three dimensions by the cloud's size, for ordinary and for difficult clouds.

python -m benchmarks.micro.knn_growth [--threads 2] [--quick] [--json PATH]

A plot of the same name is saved beside PATH.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import command
from benchmarks.environment import environment
from paper_layers import knn

SIZES = (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
K = 16


def _outlier(n: int) -> Tensor:
    cloud = torch.rand(n, 3)
    cloud[0] = 1e6
    return cloud


CLOUDS: dict[str, Callable[[int], Tensor]] = {
    "uniform": lambda n: torch.rand(n, 3),
    "200 tight blobs": lambda n: torch.rand(200, 3)[torch.randint(200, (n,))] + 1e-3 * torch.randn(n, 3),
    "on a line": lambda n: torch.rand(n, 1) * torch.tensor([1.0, 2.0, 3.0]),
    "one far outlier": _outlier,
    "every point 100 times": lambda n: torch.rand(n // 100, 3).repeat(100, 1),
    "all points equal": lambda n: torch.ones(n, 3),
}


def measure(cloud: Tensor) -> float:
    """Return the median of five runs, or of fewer if they take more than two seconds."""
    times: list[float] = []
    knn(cloud[None], k=K)
    while len(times) < 5 and (len(times) < 2 or sum(times) < 2):
        start = time.perf_counter()
        knn(cloud[None], k=K)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def picture(results: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in CLOUDS:
        rows = [r for r in results if r["cloud"] == name]
        axes.loglog([r["points"] for r in rows], [r["seconds"] * 1e3 for r in rows], "o-", label=name)
    first = next(r for r in results if r["cloud"] == "uniform")
    sizes = sorted({r["points"] for r in results})
    linear = [first["seconds"] * 1e3 * n / first["points"] for n in sizes]
    axes.loglog(sizes, linear, ":", color="gray", label="linear")
    axes.set(xlabel="points", ylabel="ms", title=f"paper_layers.knn, C = 3, k = {K}")
    axes.legend()
    return figure


def main() -> None:
    parser = command.parser(__doc__, "up to 30000 points")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = [n for n in SIZES if n <= 30_000] if options.quick else SIZES
    head = {"benchmark": "knn_growth", **environment(), "threads": options.threads, "k": K}
    results = []
    for name, n in tqdm([(name, n) for name in CLOUDS for n in sizes]):
        results.append({"cloud": name, "points": n, "seconds": measure(CLOUDS[name](n))})
    for row in results:
        milliseconds, each = row["seconds"] * 1e3, row["seconds"] / row["points"] * 1e6
        print(f"{row['cloud']:24} {row['points']:9,} points {milliseconds:10.2f} ms {each:7.2f} us each")
    if options.json:
        command.save(options.json, {**head, "results": results}, lambda: picture(results))


if __name__ == "__main__":
    main()
