"""LIP pooling against the official formula, torch.compile of it, torch's pools and SoftPool.

python -m benchmarks.micro.lip [--device cuda] [--threads 2 1] [--quick] [--json PATH]
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
# Layout, our dtype, whether with backward, peer (in float32), how many times as fast we have to be at every shape.
TARGETS = (
    ("NCHW", "float32", False, FORMULA, 4.0),
    ("NCHW", "float32", True, FORMULA, 3.0),
    ("NCHW", "float32", False, MAX, 1.0),
    ("NCHW", "float32", True, MAX, 1.0),
    ("channels_last", "float32", False, FORMULA, 3.0),
    ("channels_last", "float32", True, FORMULA, 2.5),
    ("channels_last", "float32", False, COMPILED, 1.0),
    ("channels_last", "float32", True, COMPILED, 1.0),
    ("NCHW", "bfloat16", False, FORMULA, 2.0),
    ("NCHW", "bfloat16", True, FORMULA, 2.0),
    ("channels_last", "bfloat16", False, FORMULA, 2.0),
    ("channels_last", "bfloat16", True, FORMULA, 2.0),
)


def inputs(case: Case) -> Inputs:
    dtype, layout = getattr(torch, case.params["dtype"]), LAYOUTS[case.params["layout"]]
    tensors = [torch.randn(case.params["shape"], device=case.device) for _ in range(2)]
    return tuple(t.to(dtype).contiguous(memory_format=layout).requires_grad_() for t in tensors)


def make_case(shape: tuple[int, ...], layout: str, dtype: str, backward: bool, device: str) -> Case:
    # Forward reads x and logit and writes a quarter; backward reads these three and the gradient, and writes two.
    passes = 6.75 if backward else 2.25
    moved = int(passes * math.prod(shape) * getattr(torch, dtype).itemsize)
    return Case({"shape": shape, "layout": layout, "dtype": dtype}, inputs, moved, backward, device)


def measure(shapes: Sequence[tuple[int, ...]], device: str, threads: int, quick: bool = False) -> list[Result]:
    """All contenders; `quick` is float32, without the minutes of torch.compile, and fewer rounds."""
    dtypes = ("float32",) if quick else ("float32", "bfloat16")
    contenders = [c for c in CONTENDERS if not (quick and c.compiled)]
    cases = [make_case(s, m, d, b, device) for s in shapes for m in LAYOUTS for d in dtypes for b in (False, True)]
    return compare(contenders, cases, threads, *((3, 0.1) if quick else (5, 0.3)))


def targets(results: Sequence[Result]) -> str:
    """What the package promises of this op, and what was measured, at each shape."""
    shapes = dict.fromkeys(r.params["shape"] for r in results)
    found = {(*r.params.values(), r.backward, r.contender): r for r in results if not r.error}

    def faster(shape: tuple[int, ...], layout: str, dtype: str, backward: bool, peer: str) -> float:
        mine, other = (
            found.get((shape, layout, dtype, backward, OURS)),
            found.get((shape, layout, "float32", backward, peer)),
        )
        return other.median / mine.median if mine and other else math.nan

    text = [f"  {'target: times as fast as a peer in float32, at each shape':66}{'wanted':>8}  measured"]
    for layout, dtype, backward, peer, wanted in TARGETS:
        values = [faster(shape, layout, dtype, backward, peer) for shape in shapes]
        title = f"{layout} {dtype} {'forward+backward' if backward else 'forward'}, {peer}"
        text.append(_verdict(title, values, wanted, all(value >= wanted for value in values)))
    for contender, wanted in ((OURS, 0.5), (FORMULA, math.nan)):
        kept = [r.saved / _input_bytes(r) for key, r in found.items() if r.backward and key[-1] == contender]
        title = f"saved for backward, in inputs: {contender}"
        text.append(_verdict(title, kept or [math.nan], wanted, bool(kept) and max(kept) <= wanted))
    return "\n".join(text)


def _input_bytes(result: Result) -> int:
    return math.prod(result.params["shape"]) * getattr(torch, result.params["dtype"]).itemsize


def _verdict(title: str, measured: Sequence[float], wanted: float, reached: bool) -> str:
    values = " ".join(dict.fromkeys("not measured" if math.isnan(v) else f"{v:.2f}" for v in measured))
    if math.isnan(wanted):
        return f"  {title:66}{'':8}  {values}"
    verdict = "" if all(map(math.isnan, measured)) else ": reached" if reached else ": MISSED"
    return f"  {title:66}{wanted:8.2f}  {values}{verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="CPU threads, one run each")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="N,C,H,W", type=_shape)
    parser.add_argument("--quick", action="store_true", help="float32, without torch.compile, fewer rounds")
    parser.add_argument("--json", metavar="PATH", help="write all numbers there")
    options = parser.parse_args()

    head = environment(options.device)
    print("\n".join(f"{name}: {value}" for name, value in head.items()))
    results = []
    for threads in options.threads:
        part = measure(options.shapes, options.device, threads, options.quick)
        print(table(part), f"\n{threads} threads\n{targets(part)}", sep="\n")
        results += part
    if options.json:
        save(
            options.json,
            {"benchmark": "lip_pool2d, kernel 3, stride 2, padding 1", **head, "results": as_dicts(results)},
        )


def _shape(text: str) -> tuple[int, ...]:
    n, c, h, w = map(int, text.split(","))
    return n, c, h, w


if __name__ == "__main__":
    main()
