"""Command line and tables of the micro benchmarks."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks import command
from benchmarks.environment import environment
from benchmarks.micro.harness import Comparison, Result, compare

Options = argparse.Namespace


def times_as_fast(ours: Result | None, theirs: Result | None) -> float:
    """Return the ratio, or NaN unless both were measured."""
    return theirs.median / ours.median if ours and theirs else math.nan


@dataclass(frozen=True)
class Target:
    """A number that every one of several measurements must reach; NaN for missing measurements."""

    title: str
    wanted: float  # NaN: print only the measurements.
    measured: Sequence[float]
    at_most: bool = False

    def __str__(self) -> str:
        if all(map(math.isnan, self.measured)):
            return f"  {self.title:88}{self.wanted:8.2f}  not measured"
        values = " ".join("not measured" if math.isnan(v) else f"{v:.2f}" for v in self.measured)
        if math.isnan(self.wanted):
            return f"  {self.title:88}{'':8}  {values}"
        reached = all(v <= self.wanted if self.at_most else v >= self.wanted for v in self.measured)
        return f"  {self.title:88}{self.wanted:8.2f}  {values}: {'reached' if reached else 'MISSED'}"


def main(
    benchmark: str,
    plan: Callable[[Options], Iterable[Comparison]],
    *,
    doc: str | None,
    quick: str = "fewer rounds",
    threads: Sequence[int] = (2,),
    extend: Callable[[argparse.ArgumentParser], Any] | None = None,
    targets: Callable[[list[Result], str], Iterable[Target]] | None = None,
    more: Callable[[Options], dict[str, Any]] | None = None,
    picture: Callable[[dict[str, Any]], Any] | None = None,
) -> None:
    """Measure as the command line says, print tables and targets, and save the results.

    benchmark: Its name in the result file.
    plan: Return the comparisons of a run.
    doc: The benchmark's docstring, printed by --help.
    quick: Help for --quick: the parts that it leaves out.
    threads: Default numbers of threads.
    extend: Add further options to the parser.
    targets: Return the targets for results of a device.
    more: Measure and print something else, and return its part of the result file; not with --only.
    picture: Draw the file's content, for an image beside the result file.
    """
    parser = command.parser(doc, quick)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[*threads], help="CPU threads, one run each")
    parser.add_argument("--only", default="", metavar="TEXT", help="nothing but the cases whose titles contain it")
    if extend:
        extend(parser)
    options = parser.parse_args()

    content = {"benchmark": benchmark, **environment(options.device)}
    print("\n".join(f"{name}: {value}" for name, value in list(content.items())[1:]))
    results: list[Result] = []
    for count in options.threads:
        part: list[Result] = []
        for comparison in plan(options):
            cases = [replace(case, device=options.device) for case in comparison.cases if options.only in case.title]
            chosen = replace(comparison, cases=cases)
            part += compare(replace(chosen, rounds=3, seconds=0.1) if options.quick else chosen, count)
        print(table(part))
        lines = [str(target) for target in targets(part, options.device)] if targets else []
        if lines:
            print(f"\n  {f'target, {count} threads':88}{'wanted':>8}  measured", *lines, sep="\n")
        results += part
    content["results"] = as_dicts(results)
    if more and not options.only:
        content |= more(options)
    if options.json:
        draw = functools.partial(picture, content) if picture and not options.only else None
        command.save(options.json, content, draw)


def table(results: Sequence[Result]) -> str:
    """Format the results, one block per case; losses are listed like wins."""
    blocks = []
    for (case, threads), group in itertools.groupby(results, lambda r: (r.case, r.threads)):
        rows, notes, found = [], [], list(group)
        for r in found:
            if r.error:
                notes.append(f"{r.contender} cannot run: {r.error}")
                continue
            times = f"{r.median * 1e3:.3f}", f"{r.iqr * 1e3:.3f}", f"{r.to_limit:.2f}", f"{r.to_ours:.2f}"
            memory = ("", "") if r.role == "limit" else (f"{r.saved / 1e6:.1f}", f"{r.peak / 1e6:.1f}")
            rows.append((r.contender, *times, *memory))
            mine = next(o.checksum for o in found if o.role == "ours")
            if r.role == "peer" and abs(r.checksum - mine) > 0.02 * abs(mine):
                notes.append(f"{r.contender} computes something else: mean {r.checksum:.5g}, ours {mine:.5g}")
        head = (", ".join(found[0].params), "median ms", "IQR", "x limit", "x ours", "saved MB", "peak MB")
        blocks.append("\n".join(["", f"{case}, {threads} threads", command.text_table(head, rows), *notes]))
    return "\n".join(blocks)


def as_dicts(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Convert a result to JSON, without empty fields."""
    return [{k: v for k, v in asdict(r).items() if v != "" and v == v} for r in results]
