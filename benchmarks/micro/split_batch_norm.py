"""Split batch norm against torch's batch norm of one part and timm's of several.

python -m benchmarks.micro.split_batch_norm [--device cuda] [--threads 2 1] [--json PATH]
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.environment import environment, save
from benchmarks.micro.harness import Case, Contender, Inputs, Result, as_dicts, compare, table
from paper_layers import SplitBatchNorm2d

SHAPES = ((32, 64, 56, 56), (32, 256, 28, 28), (32, 2048, 7, 7))
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
OURS, TORCH, TIMM = "SplitBatchNorm2d, 2 splits", "nn.BatchNorm2d, one norm", "timm SplitBatchNorm2d, 2 splits"


@functools.cache
def layer(name: str, channels: int, device: str) -> nn.Module:
    """One for all calls, in training; timm only in the process that needs it."""
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
# Layout, other, our time at most in its own, on a CPU and on a GPU.
TARGETS = (
    ("NCHW", TORCH, {"cpu": 0.7, "cuda": 1.1}),
    ("NCHW", TIMM, {"cpu": 1 / 1.8}),
    ("channels_last", TORCH, {"cpu": 1.0, "cuda": 1.1}),
    ("channels_last", TIMM, {"cpu": 1 / 1.4}),
)


def measure(shapes: Sequence[tuple[int, ...]], device: str, threads: int) -> list[Result]:
    """Forward and backward in training. It reads the input, writes the output, reads gradient and input, writes one."""
    cases = [
        Case({"shape": shape, "layout": layout}, inputs, 5 * 4 * math.prod(shape), True, device)
        for shape in shapes
        for layout in LAYOUTS
    ]
    return compare(CONTENDERS, cases, threads, rounds=7)


def targets(results: Sequence[Result], device: str) -> str:
    """Our time in that of others, wanted and measured at each shape, and the memory."""
    found = {(*r.params.values(), r.contender): r for r in results if not r.error}
    shapes = dict.fromkeys(r.params["shape"] for r in results)
    text = [f"  {'our time in that of':48}{'at most':>8}  at " + ", ".join(map(str, shapes))]
    for layout, other, wanted in TARGETS:
        pairs = [(found.get((shape, layout, OURS)), found.get((shape, layout, other))) for shape in shapes]
        ratios = [ours.median / theirs.median if ours and theirs else math.nan for ours, theirs in pairs]
        values, limit = " ".join(f"{ratio:.2f}" for ratio in ratios), wanted.get(device, math.nan)
        missing = math.isnan(limit) or any(map(math.isnan, ratios))
        verdict = "" if missing else ": reached" if max(ratios) <= limit else ": MISSED"
        text.append(f"  {layout + ', ' + other:48}{limit:8.2f}  {values}{verdict}")
    peaks = [r.peak / (4 * math.prod(r.params["shape"])) for r in found.values() if r.contender == OURS]
    if peaks:  # The output, the input's gradient, and what is kept of channels.
        verdict = "reached" if max(peaks) <= 2.01 else "MISSED"
        text.append(f"  {'peak memory, in inputs':48}{2.01:8.2f}  {max(peaks):.3f}: {verdict}")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="CPU threads, one run each")
    parser.add_argument("--json", metavar="PATH", help="write all numbers there")
    options = parser.parse_args()

    head = environment(options.device)
    print("\n".join(f"{name}: {value}" for name, value in head.items()))
    results = []
    for threads in options.threads:
        part = measure(SHAPES, options.device, threads)
        print(table(part), f"\n{threads} threads\n{targets(part, options.device)}", sep="\n")
        results += part
    if options.json:
        save(
            options.json,
            {"benchmark": "split batch norm, forward+backward, float32", **head, "results": as_dicts(results)},
        )


if __name__ == "__main__":
    main()
