"""PointRend's subdivision against the official procedure, its best form in plain PyTorch and dense prediction.

python -m benchmarks.micro.point_rend [--device cuda] [--threads 2 1] [--quick] [--only TEXT] [--json PATH]

A plot of the same name is saved beside PATH: multiply-adds, time and memory by the mask's side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.micro.command import Options, as_dicts, main, table
from benchmarks.micro.harness import Case, Comparison, Contender, Inputs, compare
from benchmarks.micro.uncertain_points import running_uncertainty
from paper_layers.point_rend import PointRendMask, PointRendSemantic, load_official
from testing.official import point_rend as official

OURS, OFFICIAL, PLAIN, DENSE = "paper_layers.point_rend", "official procedure", "its best form in PyTorch", "dense"
CLASSES, POINTS, SCALE = 80, 28 * 28, 0.25
BOXES, GROWTH_BOXES = 100, 8
SIDES = (28, 56, 112, 224, 448)
FEATURES = (1, 256, 200, 304)
CHUNK = 8  # Boxes at a time.


class _Parts(nn.Module):
    """The official point head, under its official name."""

    def __init__(self, classes: int, each: bool):
        super().__init__()
        self.point_head = official.randomize(official.PointHead(256, classes, each=each))


# --- masks of boxes


def mask_inputs(case: Case) -> Inputs:
    """Make both heads with the same parameters, coarse logits, channels_last features, boxes and classes."""
    theirs = _Parts(CLASSES, True)
    ours = PointRendMask(256, CLASSES, spatial_scale=SCALE)
    load_official(ours.point_head, theirs.state_dict())
    count = case.params["boxes"]
    corner = torch.rand(count, 2) * torch.tensor([800.0, 500.0])
    boxes = torch.cat([corner, corner + 20 + 300 * torch.rand(count, 2)], 1)
    tensors = (torch.randn(count, CLASSES, 7, 7), torch.randn(FEATURES), boxes, torch.randint(CLASSES, (count,)))
    coarse, features, boxes, labels = (t.to(case.device) for t in tensors)
    features = features.contiguous(memory_format=torch.channels_last)
    heads = (ours.to(case.device).eval(), theirs.point_head.to(case.device).eval())
    return (*heads, coarse, features, boxes, labels, case.params["side"])


def mask_inputs_planar(case: Case) -> Inputs:
    """Make the same inputs with features in NCHW."""
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in mask_inputs(case))


def mask_ours(
    ours: PointRendMask, head: nn.Module, coarse: Tensor, features: Tensor, boxes: Tensor, labels: Tensor, side: int
) -> Tensor:
    return ours.refine(features, coarse, [boxes], labels, size=side)


def mask_official(
    ours: nn.Module, head: nn.Module, coarse: Tensor, features: Tensor, boxes: Tensor, labels: Tensor, side: int
) -> Tensor:
    steps = (side // 7).bit_length() - 1
    logits = official.mask_inference(coarse, features, [boxes], labels, head, steps, 7, POINTS, SCALE)
    return official.of_class(logits, labels)


def mask_plain(
    ours: nn.Module, head: nn.Module, coarse: Tensor, features: Tensor, boxes: Tensor, labels: Tensor, side: int
) -> Tensor:
    """Compute only the map of the predicted class, a few boxes at a time."""
    parts = []
    for c, b, k in _chunks(coarse, boxes, labels):
        points = official.regular_points(len(b), 28, b.device)
        values = official.mask_points(c, features, [b], head, points, SCALE)
        logits = official.of_class(values, k).unflatten(2, (28, 28))
        while logits.shape[3] < side:
            logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
            index, points = official.grid_points(-logits[:, 0].abs(), POINTS)
            values = official.of_class(official.mask_points(c, features, [b], head, points, SCALE), k)
            logits.flatten(2).scatter_(2, index[:, None], values)
        parts.append(logits)
    return torch.cat(parts)


def mask_dense(
    ours: nn.Module, head: nn.Module, coarse: Tensor, features: Tensor, boxes: Tensor, labels: Tensor, side: int
) -> Tensor:
    """Label every pixel, in chunks of as many points as above."""
    parts = []
    every = official.regular_points(1, side, coarse.device)
    for c, b, k in zip(coarse.split(1), boxes.split(1), labels.split(1), strict=True):
        pieces = every.split(CHUNK * POINTS, 1)
        values = [official.of_class(official.mask_points(c, features, [b], head, p, SCALE), k) for p in pieces]
        parts.append(torch.cat(values, 2))
    return torch.cat(parts).unflatten(2, (side, side))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(CHUNK) for t in tensors), strict=True)


def product_inputs(case: Case) -> Inputs:
    weights = [torch.randn(size, 336, device=case.device) for size in (256, 256, 256, CLASSES)]
    maps = (case.params["side"] // 28).bit_length()
    return (torch.randn(CHUNK * POINTS, 336, device=case.device), maps * case.params["boxes"] / CHUNK, *weights)


def products(x: Tensor, times: float, *weights: Tensor) -> Tensor:
    for part in [x] * int(times) + [x[: round(times % 1 * len(x))]]:
        for weight in weights:
            y = F.linear(part, weight)
    return y


MASK_LIMIT = Contender("limit: products of the point head", products, "limit", inputs=product_inputs)
MASK_CONTENDERS = (
    Contender(OURS, mask_ours, "ours"),
    Contender(f"{OURS}, NCHW features", mask_ours, "other", inputs=mask_inputs_planar),
    Contender(OFFICIAL, mask_official, "peer", inputs=mask_inputs_planar),
    Contender(PLAIN, mask_plain, "peer"),
)
# With glibc's defaults, which don't keep the heap.
MASK_DEFAULTS = tuple(
    replace(contender, name=f"{contender.name}, malloc's defaults", role="other", keeps_heap=False)
    for contender in (MASK_CONTENDERS[0], *MASK_CONTENDERS[2:])
)
MASK_DENSE = Contender(f"{DENSE} at this size", mask_dense, "other")


# --- semantic maps


def semantic_inputs(case: Case) -> Inputs:
    n, classes, height, width = case.params["coarse"]
    theirs = _Parts(classes, False)
    ours = PointRendSemantic(256, classes)
    load_official(ours, theirs.state_dict())
    # Smooth like a network's logits: few pixels are uncertain.
    seed = torch.randn(n, classes, height // 16, width // 16)
    coarse = F.interpolate(seed, (height, width), mode="bilinear").to(case.device)
    features = torch.randn(n, 256, height, width, device=case.device).contiguous(memory_format=torch.channels_last)
    heads = (ours.to(case.device).eval(), theirs.point_head.to(case.device).eval())
    return (*heads, coarse, features, case.params["steps"])


def semantic_inputs_planar(case: Case) -> Inputs:
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in semantic_inputs(case))


def semantic_ours(ours: PointRendSemantic, head: nn.Module, coarse: Tensor, features: Tensor, steps: int) -> Tensor:
    size = (coarse.shape[2] * 2**steps, coarse.shape[3] * 2**steps)
    return ours(features, coarse, size=size)


def semantic_official(ours: nn.Module, head: nn.Module, coarse: Tensor, features: Tensor, steps: int) -> Tensor:
    return official.semantic_inference(coarse, [features], head, steps, 8192)


def semantic_plain(ours: nn.Module, head: nn.Module, coarse: Tensor, features: Tensor, steps: int) -> Tensor:
    """Keep a running best and second best instead of topk, and scatter in place."""
    logits = coarse
    for _ in range(steps):
        logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
        index, points = official.grid_points(running_uncertainty(logits), 8192)
        values = head(official.point_sample(features, points), official.point_sample(coarse, points))
        logits.flatten(2).scatter_(2, index[:, None].expand_as(values), values)
    return logits


SEMANTIC_CONTENDERS = (
    Contender(OURS, semantic_ours, "ours"),
    Contender(f"{OURS}, NCHW features", semantic_ours, "other", inputs=semantic_inputs_planar),
    Contender(OFFICIAL, semantic_official, "peer", inputs=semantic_inputs_planar),
    Contender(PLAIN, semantic_plain, "peer"),
)


def plan(options: Options) -> list[Comparison]:
    params = {"masks of": "boxes", "boxes": BOXES, "side": 224}
    masks = Case(params, mask_inputs, 4 * math.prod(FEATURES), backward=False)
    contenders = (*MASK_CONTENDERS, *MASK_DEFAULTS, *(() if options.quick else (MASK_DENSE,)))
    params = {"map": "semantic", "coarse": (1, 19, 256, 512), "steps": 2}
    semantic = Case(params, semantic_inputs, 2 * 4 * 19 * 1024 * 2048, backward=False)
    return [
        Comparison(contenders, [masks], MASK_LIMIT, seconds=0.5),
        Comparison(SEMANTIC_CONTENDERS, [semantic], seconds=0.5),
    ]


# --- growth with the size of the mask


def growth(options: Options) -> dict[str, Any]:
    """Measure masks of several sides, and count their multiply-adds."""
    settings = {"masks of": "boxes", "boxes": GROWTH_BOXES}
    sides, rounds, seconds = (SIDES[:-2], 2, 0.1) if options.quick else (SIDES, 5, 0.2)
    moved = 4 * math.prod(FEATURES)
    cases = [Case({**settings, "side": s}, mask_inputs, moved, False, options.device) for s in sides]
    contenders = (MASK_CONTENDERS[0], MASK_CONTENDERS[2], MASK_DENSE)
    results = compare(Comparison(contenders, cases, MASK_LIMIT, rounds, seconds), options.threads[0])
    print(table(results))
    counts = [_multiply_adds(case, contender) for case in cases for contender in contenders]
    for row in counts:
        print(f"{row['contender']:34} {row['side']:4} {row['multiply_adds'] / 1e9:8.3f} G multiply-adds a mask")
    return {"growth": as_dicts(results), "multiply_adds": counts}


def _multiply_adds(case: Case, contender: Contender) -> dict[str, Any]:
    """Count the point head's multiply-adds for one mask."""
    one = Case({**case.params, "boxes": 1}, case.inputs, 0, False, case.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        contender.function(*(contender.inputs or case.inputs)(one))
    row = {"contender": contender.name, "side": case.params["side"]}
    return {**row, "multiply_adds": counter.get_total_flops() // 2}


def picture(content: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = panels = figure.subplots(1, 3)
    for name in dict.fromkeys(row["contender"] for row in content["multiply_adds"]):
        mine = [row for row in content["multiply_adds"] if row["contender"] == name]
        left.loglog([r["side"] for r in mine], [r["multiply_adds"] / 1e9 for r in mine], "o-", label=name)
        rows = [r for r in content["growth"] if r["contender"] == name and "error" not in r]
        sides = [r["params"]["side"] for r in rows]
        middle.loglog(sides, [r["median"] * 1e3 / GROWTH_BOXES for r in rows], "o-", label=name)
        right.loglog(sides, [r["peak"] / 1e6 / GROWTH_BOXES for r in rows], "o-", label=name)
    for axes, title in zip(panels, ("10^9 multiply-adds a mask", "milliseconds a mask", "peak MB a mask"), strict=True):
        axes.set(title=title, xlabel="side of the mask, pixels")
        axes.set_xticks(SIDES, [str(side) for side in SIDES])
        axes.minorticks_off()
    left.legend()
    return figure


if __name__ == "__main__":
    quick = "fewer rounds, no dense masks of 224 pixels"
    main("point_rend", plan, doc=__doc__, quick=quick, more=growth, picture=picture)
