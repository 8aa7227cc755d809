"""Host time per call on tiny tensors and dispatched ops, for every op and layer, beside torch's nearest of its own.

python -m benchmarks.micro.overhead [--quick] [--only TEXT] [--json PATH]

One thread, CPU time of that thread, best of several rounds that all take turns. On a GPU, these decide small layers.
Dispatched ops are those that reach a backend, forward and backward; they are the same on any machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paper_layers
from benchmarks import command
from benchmarks.environment import environment
from paper_layers import big_bigan, deep_gcn
from testing.counting import dispatched_ops

Run = Callable[[], Any]


def _forward(function: Run) -> Run:
    def run() -> None:
        with torch.no_grad():
            function()

    return run


def _both(function: Run, *leaves: Tensor) -> Run:
    """Return forward and backward; the gradient of the output is made beforehand."""
    first = function()
    grad = torch.ones_like(first[0] if isinstance(first, tuple) else first)

    def run() -> None:
        output = function()
        torch.autograd.grad(output[0] if isinstance(output, tuple) else output, leaves, grad)

    return run


def contenders() -> dict[str, tuple[Run, Run | None]]:
    """Return forward without gradient and forward with backward, by name; torch's own come before ours."""
    torch.manual_seed(0)
    image, points = torch.randn(4, 16, 8, 8, requires_grad=True), torch.rand(4, 16, 2)
    cloud = torch.randn(2, 64, 16, requires_grad=True)
    index = paper_layers.knn(cloud.detach(), k=4).indices
    embeddings, centers = torch.randn(8, 16, requires_grad=True), torch.randn(10, 3, 16, requires_grad=True)
    labels, rows = torch.arange(8), torch.randn(8, 16, requires_grad=True)
    linear, spectral = nn.Linear(16, 16), nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
    own_spectral = big_bigan.SpectralLinear(16, 16)
    norm, split = nn.BatchNorm2d(16), paper_layers.SplitBatchNorm2d(16)
    loss = paper_layers.SoftTripleLoss(10, 16, 3)
    convs = {name: getattr(deep_gcn, name)(16, 16) for name in ("EdgeConv", "MRConv", "GINConv", "SAGEConv")}
    block = deep_gcn.ResGCNBlock(16, k=4)

    def both(function: Run, *leaves: Tensor) -> tuple[Run, Run]:
        return _forward(function), _both(function, *leaves)

    def layer(module: nn.Module, *arguments: Tensor) -> tuple[Run, Run]:
        leaves = [t for t in (*arguments, *module.parameters()) if t.requires_grad]
        return both(lambda: module(*arguments), *leaves)

    def gathered() -> Tensor:
        return cloud[torch.arange(2)[:, None, None], index].amax(2)

    found: dict[str, tuple[Run, Run | None]] = {
        "F.max_pool2d": both(lambda: F.max_pool2d(image, 3, 2, 1), image),
        "lip_pool2d": both(lambda: paper_layers.lip_pool2d(image, image, 3, 2, 1), image),
        "F.grid_sample": both(lambda: F.grid_sample(image, points[:, None], align_corners=False), image),
        "point_sample": both(lambda: paper_layers.point_sample(image, points), image),
        "torch.cdist, topk": (_forward(lambda: torch.cdist(cloud, cloud).topk(4, largest=False)), None),
        "knn": (_forward(lambda: paper_layers.knn(cloud, k=4)), None),
        "x[index].amax": both(gathered, cloud),
        "neighbor_reduce": both(lambda: paper_layers.neighbor_reduce(cloud, index), cloud),
        "edge_conv": both(lambda: paper_layers.edge_conv(cloud, cloud, index), cloud),
        **{name: layer(conv, cloud, index) for name, conv in convs.items()},
        "ResGCNBlock": layer(block, cloud),
        "F.cross_entropy": both(lambda: F.cross_entropy(embeddings, labels), embeddings),
        "SoftTripleLoss": layer(loss, embeddings, labels),
        "nn.BatchNorm2d": layer(norm, image),
        "SplitBatchNorm2d": layer(split, image),
        "nn.Linear": layer(linear, rows),
        "nn.Linear, spectral_norm": layer(spectral, rows),
        "SpectralLinear": layer(own_spectral, rows),
    }
    return found


def measure(runs: dict[str, Run], rounds: int, calls: int) -> dict[str, float]:
    """Return the least seconds per call of each, over rounds that take turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            start = time.thread_time()
            for _ in range(calls):
                run()
            best[name] = min(best[name], (time.thread_time() - start) / calls)
    return best


def main() -> None:
    """Measure as the command line says."""
    parser = command.parser(__doc__, "fewer rounds")
    parser.add_argument("--only", default="", metavar="TEXT", help="nothing but the names that contain it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {name: runs for name, runs in contenders().items() if options.only in name}
    rounds, calls = (5, 50) if options.quick else (30, 200)
    forward = measure({name: runs[0] for name, runs in chosen.items()}, rounds, calls)
    backward = measure({name: runs[1] for name, runs in chosen.items() if runs[1]}, rounds, calls)
    rows = []
    for name, (alone, both) in chosen.items():
        row: dict[str, Any] = {"name": name, "forward": forward[name], "forward ops": len(dispatched_ops(alone))}
        if both is not None:
            row |= {"both": backward[name], "both ops": len(dispatched_ops(both))}
        rows.append(row)
    head = ("", "forward us", "ops", "forward+backward us", "ops")
    lines = [
        (
            row["name"], f"{row['forward'] * 1e6:.1f}", str(row["forward ops"]),
            f"{row['both'] * 1e6:.1f}" if "both" in row else "", str(row.get("both ops", "")),
        )
        for row in rows
    ]  # fmt: skip
    print(command.text_table(head, lines))
    if options.json:
        command.save(options.json, {"benchmark": "overhead", **environment(), "results": rows})


if __name__ == "__main__":
    main()
