"""Point sampling against grid_sample, in NCHW and channels_last, and against grid_sample of each level and a cat.

python -m benchmarks.micro.point_sample [--device cuda] [--threads 2 1] [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.environment import environment, save
from benchmarks.micro.harness import Case, Contender, Inputs, Result, as_dicts, compare, table
from paper_layers import point_sample

MAP = ((8, 256, 128, 128),)
PYRAMID = tuple((2, 256, 800 // stride, 1216 // stride) for stride in (4, 8, 16, 32))
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def ours(points: Tensor, *maps: Tensor) -> Tensor:
    return point_sample(maps, points)


def grid_sample(points: Tensor, *maps: Tensor) -> Tensor:
    """What the official code does, level by level."""
    grid = 2 * points[:, :, None] - 1
    levels = [F.grid_sample(map, grid, align_corners=False)[..., 0] for map in maps]
    return levels[0] if len(levels) == 1 else torch.cat(levels, 1)


OURS, PEER = "paper_layers.point_sample", "F.grid_sample [+ cat]"
CONTENDERS = (Contender(OURS, ours, "ours"), Contender(PEER, grid_sample, "peer"))
# Name of the maps, points, layout, whether with backward, how many times as fast as grid_sample we have to be.
TARGETS = (
    ("one map", 2048, "NCHW", False, 1.3),
    ("one map", 2048, "NCHW", True, 2.5),
    ("one map", 8192, "NCHW", False, 4.0),
    ("one map", 8192, "NCHW", True, 7.0),
    ("one map", 2048, "channels_last", False, 2.0),
    ("one map", 2048, "channels_last", True, 2.0),
    ("one map", 8192, "channels_last", False, 2.0),
    ("one map", 8192, "channels_last", True, 2.0),
    ("pyramid", 2048, "NCHW", False, 3.0),
    ("pyramid", 2048, "NCHW", True, 3.0),
    ("pyramid", 2048, "channels_last", False, 2.0),
    ("pyramid", 2048, "channels_last", True, 2.0),
)


def inputs(case: Case) -> Inputs:
    layout, shapes = LAYOUTS[case.params["layout"]], MAP if case.params["maps"] == "one map" else PYRAMID
    maps = [torch.randn(shape, device=case.device).contiguous(memory_format=layout) for shape in shapes]
    points = torch.rand(shapes[0][0], case.params["points"], 2, device=case.device)
    return (points, *(map.requires_grad_() for map in maps))


def moved(shapes: Sequence[tuple[int, ...]], points: int, layout: str, backward: bool) -> int:
    """Bytes of the lines that are read and of the output; backward reads a gradient and writes all of the maps'."""
    total = 0
    for n, c, h, w in shapes:
        # Of n random points: a pixel is taken by one of four corners, a line of a plane holds sixteen pixels.
        near = 4 if layout == "channels_last" else 2 * (1 + 16)
        pixels_read = h * w * (1 - math.exp(-near * points / (h * w)))
        output = n * c * points
        total += n * c * pixels_read + output + (output + n * c * h * w if backward else 0)
    return int(4 * total)


def make_case(maps: str, points: int, layout: str, backward: bool, device: str) -> Case:
    params = {"maps": maps, "points": points, "layout": layout}
    shapes = MAP if maps == "one map" else PYRAMID
    return Case(params, inputs, moved(shapes, points, layout, backward), backward, device)


def measure(device: str, threads: int, quick: bool = False) -> list[Result]:
    kinds = dict.fromkeys((maps, points, layout, backward) for maps, points, layout, backward, _ in TARGETS)
    cases = [make_case(*kind, device) for kind in kinds]
    return compare(CONTENDERS, cases, threads, *((2, 0.1) if quick else (5, 0.3)))


def targets(results: Sequence[Result]) -> str:
    """What the package promises of this op, and what was measured."""
    found = {(*r.params.values(), r.backward, r.contender): r for r in results if not r.error}
    text = [f"  {'target: times as fast as grid_sample':60}{'wanted':>8}  measured"]
    for *kind, wanted in TARGETS:
        maps, points, layout, backward = kind
        mine, peer = found.get((*kind, OURS)), found.get((*kind, PEER))
        value = peer.median / mine.median if mine and peer else math.nan
        title = f"{maps}, P {points}, {layout}, {'forward+backward' if backward else 'forward'}"
        verdict = "not measured" if math.isnan(value) else f"{value:.2f}: {'reached' if value >= wanted else 'MISSED'}"
        text.append(f"  {title:60}{wanted:8.2f}  {verdict}")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="CPU threads, one run each")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", metavar="PATH", help="write all numbers there")
    options = parser.parse_args()

    head = environment(options.device)
    print("\n".join(f"{name}: {value}" for name, value in head.items()))
    results = []
    for threads in options.threads:
        part = measure(options.device, threads, options.quick)
        print(table(part), f"\n{threads} threads\n{targets(part)}", sep="\n")
        results += part
    if options.json:
        save(options.json, {"benchmark": "point_sample", **head, "results": as_dicts(results)})


if __name__ == "__main__":
    main()
