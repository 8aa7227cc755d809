"""LIP pooling against the official formula, torch.compile of it, torch's pools and SoftPool.

python -m benchmarks.micro.lip [--device cuda] [--threads 2 1] [--shapes N,C,H,W] [--quick] [--only TEXT] [--json PATH]
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.micro.command import Options, Target, main, times_as_fast
from benchmarks.micro.harness import Case, Comparison, Contender, Inputs, Result
from paper_layers import lip_pool2d

SHAPES = ((8, 64, 112, 112), (8, 256, 56, 56), (8, 512, 28, 28))
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def ours(x: Tensor, logit: Tensor) -> Tensor:
    return lip_pool2d(x, logit, 3, 2, 1)


def formula(x: Tensor, logit: Tensor) -> Tensor:
    weight = logit.exp()
    return F.avg_pool2d(x * weight, 3, 2, 1) / F.avg_pool2d(weight, 3, 2, 1)


def max_pool(x: Tensor, logit: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2, 1)


def avg_pool(x: Tensor, logit: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 2, 1)


def ours_softpool(x: Tensor, logit: Tensor) -> Tensor:
    return ours(x, x)


def softpool(x: Tensor, logit: Tensor) -> Tensor:
    return formula(x, x)


OURS, FORMULA, COMPILED, MAX = "paper_layers.lip_pool2d", "official formula", "torch.compile of it", "F.max_pool2d"
CONTENDERS = (
    Contender(OURS, ours, "ours"),
    Contender(FORMULA, formula, "peer"),
    Contender(COMPILED, formula, "peer", compiled=True),
    Contender(MAX, max_pool, "other"),
    Contender("F.avg_pool2d", avg_pool, "other"),
    Contender("SoftPool: lip_pool2d(x, x)", ours_softpool, "other"),
    Contender("SoftPool: its formula", softpool, "other"),
)
# Layout, our dtype, peer (in float32), required speed-up at every shape: forward, forward + backward.
TARGETS = (
    ("NCHW", "float32", FORMULA, (4.0, 3.0)),
    ("NCHW", "float32", MAX, (1.0, 1.0)),
    ("channels_last", "float32", FORMULA, (3.0, 2.5)),
    ("channels_last", "float32", COMPILED, (1.0, 1.0)),
    ("NCHW", "bfloat16", FORMULA, (2.0, 2.0)),
    ("channels_last", "bfloat16", FORMULA, (2.0, 2.0)),
)


def inputs(case: Case) -> Inputs:
    dtype, layout = getattr(torch, case.params["dtype"]), LAYOUTS[case.params["layout"]]
    tensors = [torch.randn(case.params["shape"], device=case.device) for _ in range(2)]
    return tuple(t.to(dtype).contiguous(memory_format=layout).requires_grad_() for t in tensors)


def make_case(shape: tuple[int, ...], layout: str, dtype: str, backward: bool) -> Case:
    # Forward reads x and logit, writes 1/4; backward also reads output and gradient, writes two gradients.
    passes = 6.75 if backward else 2.25
    moved = int(passes * math.prod(shape) * getattr(torch, dtype).itemsize)
    return Case({"shape": shape, "layout": layout, "dtype": dtype}, inputs, moved, backward)


def plan(options: Options) -> list[Comparison]:
    dtypes = ("float32",) if options.quick else ("float32", "bfloat16")
    contenders = [c for c in CONTENDERS if not (options.quick and c.compiled)]
    cases = [make_case(s, m, d, b) for s in options.shapes for m in LAYOUTS for d in dtypes for b in (False, True)]
    return [Comparison(contenders, cases)]


def targets(results: Sequence[Result], device: str) -> Iterator[Target]:
    shapes = dict.fromkeys(r.params["shape"] for r in results)
    found = {(*r.params.values(), r.backward, r.contender): r for r in results if not r.error}
    for (layout, dtype, peer, both), backward in itertools.product(TARGETS, (False, True)):
        title = f"{layout} {dtype} {'forward+backward' if backward else 'forward'}: times as fast as {peer} in float32"
        pairs = [
            (found.get((s, layout, dtype, backward, OURS)), found.get((s, layout, "float32", backward, peer)))
            for s in shapes
        ]
        yield Target(title, both[backward], [times_as_fast(*pair) for pair in pairs])
    for contender, wanted in ((OURS, 0.5), (FORMULA, math.nan)):
        kept = {r.saved / _input_bytes(r) for key, r in found.items() if r.backward and key[-1] == contender}
        yield Target(f"saved for backward, in inputs: {contender}", wanted, sorted(kept), at_most=True)


def _input_bytes(result: Result) -> int:
    return math.prod(result.params["shape"]) * getattr(torch, result.params["dtype"]).itemsize


def _shape(text: str) -> tuple[int, ...]:
    n, c, h, w = map(int, text.split(","))
    return n, c, h, w


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="N,C,H,W", type=_shape)


if __name__ == "__main__":
    title, quick = "lip_pool2d, kernel 3, stride 2, padding 1", "float32, without torch.compile, fewer rounds"
    main(title, plan, doc=__doc__, quick=quick, extend=_extend, targets=targets)
