"""Uncertain points against the official formulas, and against cheaper plain PyTorch.

python -m benchmarks.micro.uncertain_points [--device cuda] [--threads 2 1] [--quick] [--only TEXT] [--json PATH]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.micro.command import Options, main
from benchmarks.micro.harness import Case, Comparison, Contender, Inputs
from paper_layers import sample_uncertain_points, uncertain_points

GRID = (  # N, C, H, W, points
    (1, 19, 1024, 2048, 8192),
    (100, 1, 224, 224, 784),
)
SAMPLER = (  # N, C, H, W, points, with labels
    (128, 80, 7, 7, 196, True),
    (2, 19, 256, 256, 8192, False),
)


def ours(logits: Tensor, num_points: int, labels: Tensor | None, sample: bool) -> Tensor:
    if sample:
        return sample_uncertain_points(logits, num_points, labels=labels)
    return uncertain_points(logits, num_points)[1]


def _centres(index: Tensor, logits: Tensor) -> Tensor:
    height, width = logits.shape[2:]
    return torch.stack([(index % width + 0.5) / width, (index // width + 0.5) / height], -1)


def _uncertainty(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return -logits[:, 0].abs()
    best = logits.topk(2, dim=1).values
    return best[:, 1] - best[:, 0]


def running_uncertainty(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return -logits[:, 0].abs()
    best, second = logits[:, 0].clone(), torch.full_like(logits[:, 0], -torch.inf)
    for other in logits[:, 1:].unbind(1):
        torch.maximum(second, torch.minimum(best, other), out=second)
        torch.maximum(best, other, out=best)
    return second.sub_(best)


def _sampler(logits: Tensor, num_points: int, uncertainty_at: Callable[[Tensor], Tensor]) -> Tensor:
    candidates = torch.rand(len(logits), 3 * num_points, 2, device=logits.device)
    count = int(0.75 * num_points)
    chosen = uncertainty_at(2 * candidates[:, None] - 1).topk(count).indices
    uniform = torch.rand(len(logits), num_points - count, 2, device=logits.device)
    return torch.cat([candidates.gather(1, chosen[..., None].expand(-1, -1, 2)), uniform], 1)


def official(logits: Tensor, num_points: int, labels: Tensor | None, sample: bool) -> Tensor:
    """Take topk(2) over all sampled classes, and topk over the points."""
    if not sample:
        return _centres(_uncertainty(logits).flatten(1).topk(num_points).indices, logits)

    def uncertainty_at(grid: Tensor) -> Tensor:
        sampled = F.grid_sample(logits, grid, align_corners=False)[:, :, 0]
        if labels is None:
            return _uncertainty(sampled)
        return -sampled[torch.arange(len(sampled), device=sampled.device), labels].abs()

    return _sampler(logits, num_points, uncertainty_at)


def plain(logits: Tensor, num_points: int, labels: Tensor | None, sample: bool) -> Tensor:
    """Keep a running best and second best; with labels, sample only the class's map."""
    if not sample:
        return _centres(running_uncertainty(logits).flatten(1).topk(num_points).indices, logits)
    if labels is not None:
        logits = logits[torch.arange(len(logits), device=logits.device), labels, None]

    def uncertainty_at(grid: Tensor) -> Tensor:
        return running_uncertainty(F.grid_sample(logits, grid, align_corners=False)[:, :, 0])

    return _sampler(logits, num_points, uncertainty_at)


def _read(x: Tensor) -> Tensor:
    return x.max()


def _read_inputs(case: Case) -> Inputs:
    return (torch.rand(max(case.moved // 4, 1), device=case.device),)


# Only the points must be written.
LIMIT = Contender("limit: read", _read, "limit", inputs=_read_inputs)
CONTENDERS = (
    Contender("paper_layers", ours, "ours"),
    Contender("official formula", official, "peer"),
    Contender("official formula, compiled", official, "peer", compiled=True),
    Contender("best and second best in PyTorch", plain, "peer"),
)


def inputs(case: Case) -> Inputs:
    n, c, h, w, num_points, *labelled = case.params["shape"]
    labels = torch.randint(0, c, (n,), device=case.device) if any(labelled) else None
    return torch.randn(n, c, h, w, device=case.device), num_points, labels, case.params["op"] == "sample"


def make_case(op: str, shape: tuple) -> Case:
    n, c, h, w, num_points, *labelled = shape
    # The logits (with labels, only their classes' planes), and the sampler's random points.
    pixels = n * h * w * (1 if any(labelled) else c)
    moved = 4 * pixels + (24 * n * num_points if labelled else 0)
    return Case({"op": op, "shape": shape}, inputs, moved, backward=False)


def plan(options: Options) -> list[Comparison]:
    cases = [make_case("grid", shape) for shape in GRID] + [make_case("sample", shape) for shape in SAMPLER]
    return [Comparison(CONTENDERS, cases, LIMIT)]


if __name__ == "__main__":
    main("uncertain_points", plan, doc=__doc__)
