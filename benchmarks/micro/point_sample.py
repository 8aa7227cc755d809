"""Point sampling against grid_sample, in NCHW and channels_last, and against grid_sample of each level and a cat.

python -m benchmarks.micro.point_sample [--device cuda] [--threads 2 1] [--quick] [--only TEXT] [--json PATH]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.micro.command import Options, Target, main, times_as_fast
from benchmarks.micro.harness import Case, Comparison, Contender, Inputs, Result
from paper_layers import point_sample

MAP = ((8, 256, 128, 128),)
PYRAMID = tuple((2, 256, 800 // stride, 1216 // stride) for stride in (4, 8, 16, 32))
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def ours(points: Tensor, *maps: Tensor) -> Tensor:
    return point_sample(maps, points)


def grid_sample(points: Tensor, *maps: Tensor) -> Tensor:
    """Sample each level and concatenate, as the official code does."""
    grid = 2 * points[:, :, None] - 1
    levels = [F.grid_sample(map, grid, align_corners=False)[..., 0] for map in maps]
    return levels[0] if len(levels) == 1 else torch.cat(levels, 1)


OURS, PEER = "paper_layers.point_sample", "F.grid_sample [+ cat]"
CONTENDERS = (Contender(OURS, ours, "ours"), Contender(PEER, grid_sample, "peer"))
# Maps, points, layout, required speed-up over grid_sample: forward, forward + backward.
TARGETS = (
    ("one map", 2048, "NCHW", (1.3, 2.5)),
    ("one map", 8192, "NCHW", (4.0, 7.0)),
    ("one map", 2048, "channels_last", (2.0, 2.0)),
    ("one map", 8192, "channels_last", (2.0, 2.0)),
    ("pyramid", 2048, "NCHW", (3.0, 3.0)),
    ("pyramid", 2048, "channels_last", (2.0, 2.0)),
)


def inputs(case: Case) -> Inputs:
    layout, shapes = LAYOUTS[case.params["layout"]], MAP if case.params["maps"] == "one map" else PYRAMID
    maps = [torch.randn(shape, device=case.device).contiguous(memory_format=layout) for shape in shapes]
    points = torch.rand(shapes[0][0], case.params["points"], 2, device=case.device)
    return (points, *(map.requires_grad_() for map in maps))


def moved(shapes: Sequence[tuple[int, ...]], points: int, layout: str, backward: bool) -> int:
    """Count bytes of the cache lines read and of the output; backward reads a gradient and writes that of the maps."""
    total = 0
    for n, c, h, w in shapes:
        # A random point reads four corner pixels; a plane's cache line holds sixteen pixels.
        near = 4 if layout == "channels_last" else 2 * (1 + 16)
        pixels_read = h * w * (1 - math.exp(-near * points / (h * w)))
        output = n * c * points
        total += n * c * pixels_read + output + (output + n * c * h * w if backward else 0)
    return int(4 * total)


def make_case(maps: str, points: int, layout: str, backward: bool) -> Case:
    params = {"maps": maps, "points": points, "layout": layout}
    shapes = MAP if maps == "one map" else PYRAMID
    return Case(params, inputs, moved(shapes, points, layout, backward), backward)


def plan(options: Options) -> list[Comparison]:
    return [Comparison(CONTENDERS, [make_case(*kind, back) for *kind, _ in TARGETS for back in (False, True)])]


def targets(results: Sequence[Result], device: str) -> Iterator[Target]:
    found = {(*r.params.values(), r.backward, r.contender): r for r in results if not r.error}
    for (maps, points, layout, both), backward in itertools.product(TARGETS, (False, True)):
        kind = (maps, points, layout, backward)
        title = f"{maps}, P {points}, {layout}, {'forward+backward' if backward else 'forward'}: times as fast"
        yield Target(title, both[backward], [times_as_fast(found.get((*kind, OURS)), found.get((*kind, PEER)))])


if __name__ == "__main__":
    main("point_sample", plan, doc=__doc__, targets=targets)
