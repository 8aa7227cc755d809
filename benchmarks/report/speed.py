"""Speed of single ops: short measurements, and a panel of bars for each case."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.micro.command import table
from benchmarks.micro.harness import Comparison, Contender, Result, compare
from benchmarks.report.page import bars


def measure(title: str, *comparisons: Comparison) -> list[Result]:
    """Measure for a few short rounds on two threads, and print the table."""
    print(f"\n{title}, in milliseconds")
    short = (replace(comparison, rounds=3, seconds=0.1) for comparison in comparisons)
    results = [result for comparison in short for result in compare(comparison, min(2, os.cpu_count() or 1))]
    print(table(results))
    return results


def named(contenders: Sequence[Contender], *names: str) -> list[Contender]:
    return [contender for contender in contenders if contender.name in names]


def caption(results: Sequence[Result]) -> str:
    return f"Milliseconds, median of interleaved rounds; {results[0].threads} threads."


def panels(results: Sequence[Result], title: Callable[[Result], str], digits: int, *, same: bool) -> Figure:
    """Draw the times of each case; `same` says that all cases have the same contenders."""
    cases = list(dict.fromkeys((r.case, r.backward) for r in results))
    figure = Figure(figsize=(9.5, 1.7), layout=ConstrainedLayoutEngine(w_pad=0.12))
    for axes, case in zip(figure.subplots(1, len(cases), sharey=same), cases, strict=True):
        rows = [r for r in results if (r.case, r.backward) == case and r.role != "limit" and not r.error]
        bars(axes, title(rows[0]), {r.contender: 1e3 * r.median for r in rows}, digits, "paper_layers")
    return figure
