"""Split batch norm against torch's batch norm of one part and timm's of several.

python -m benchmarks.micro.split_batch_norm [--device cuda] [--threads 2 1] [--quick] [--only TEXT] [--json PATH]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.micro.command import Options, Target, main, times_as_fast
from benchmarks.micro.harness import Case, Comparison, Contender, Inputs, Result
from paper_layers import SplitBatchNorm2d

SHAPES = ((32, 64, 56, 56), (32, 256, 28, 28), (32, 2048, 7, 7))
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
OURS, TORCH, TIMM = "SplitBatchNorm2d, 2 splits", "nn.BatchNorm2d, one norm", "timm SplitBatchNorm2d, 2 splits"


@functools.cache
def layer(name: str, channels: int, device: str) -> nn.Module:
    """Make one norm for all calls, in training mode; import timm only in the process that needs it."""
    if name == OURS:
        return SplitBatchNorm2d(channels, device=device)
    if name == TORCH:
        return nn.BatchNorm2d(channels, device=device)
    from testing import torchvision_stub  # noqa: F401 (timm imports torchvision, which may not load beside a CPU torch)

    from timm.layers import SplitBatchNorm2d as TimmNorm  # isort: skip

    return TimmNorm(channels).to(device)


def _apply(name: str, x: Tensor) -> Tensor:
    return layer(name, x.shape[1], x.device.type)(x)


def inputs(case: Case) -> Inputs:
    x = torch.randn(case.params["shape"], device=case.device)
    return (x.contiguous(memory_format=LAYOUTS[case.params["layout"]]).requires_grad_(),)


CONTENDERS = (
    Contender(OURS, functools.partial(_apply, OURS), "ours"),
    Contender(TORCH, functools.partial(_apply, TORCH), "other"),
    Contender(TIMM, functools.partial(_apply, TIMM), "peer"),
)
# Layout, peer, largest ratio of our time to its time on a CPU and on a GPU.
TARGETS = (
    ("NCHW", TORCH, {"cpu": 0.7, "cuda": 1.1}),
    ("NCHW", TIMM, {"cpu": 1 / 1.8}),
    ("channels_last", TORCH, {"cpu": 1.0, "cuda": 1.1}),
    ("channels_last", TIMM, {"cpu": 1 / 1.4}),
)


def plan(options: Options) -> list[Comparison]:
    """Forward and backward in training: read the input, write the output, read gradient and input, write a gradient."""
    pairs = [(shape, layout) for shape in SHAPES for layout in LAYOUTS]
    cases = [Case({"shape": s, "layout": layout}, inputs, 5 * 4 * math.prod(s), True) for s, layout in pairs]
    return [Comparison(CONTENDERS, cases, rounds=7)]


def targets(results: Sequence[Result], device: str) -> Iterator[Target]:
    found = {(*r.params.values(), r.contender): r for r in results if not r.error}
    shapes = dict.fromkeys(r.params["shape"] for r in results)
    for layout, other, wanted in TARGETS:
        pairs = [(found.get((shape, layout, other)), found.get((shape, layout, OURS))) for shape in shapes]
        ratios = [times_as_fast(*pair) for pair in pairs]
        yield Target(f"{layout}: our time in that of {other}", wanted.get(device, math.nan), ratios, at_most=True)
    # The output, the input's gradient, and statistics of channels.
    peaks = [r.peak / (4 * math.prod(r.params["shape"])) for r in found.values() if r.contender == OURS]
    yield Target("peak memory, in inputs", 2.01, peaks, at_most=True)


if __name__ == "__main__":
    title = "split batch norm, forward+backward, float32"
    main(title, plan, doc=__doc__, threads=(2, 1), targets=targets)
