"""Command line of the claims, which compare several networks trained with several seeds."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import command
from benchmarks.claims.training import in_parallel
from benchmarks.environment import environment

Options = argparse.Namespace
Cell = TypeVar("Cell", bound=Hashable)
Outcome = TypeVar("Outcome")


def parser(doc: str | None, *, seeds: int, steps: int, path: tuple[str, str]) -> argparse.ArgumentParser:
    """Return a parser of --seeds, --steps, --quick, --json, and of the option that `path` names and describes."""
    found = command.parser(doc, "does it run, rather than what comes out")
    found.add_argument(path[0], dest="path", metavar="PATH", help=path[1])
    found.add_argument("--seeds", type=int, default=seeds)
    found.add_argument("--steps", type=int, default=steps)
    return found


def main(
    run: Callable[[Cell, int, int, str | None], Outcome],
    cells: Callable[[Options], Sequence[Cell]],
    report: Callable[[dict[Cell, list[Outcome]], Options], dict[str, Any]],
    *,
    doc: str | None,
    seeds: int,
    steps: int,
    path: tuple[str, str],
    quick_steps: int = 10,
    picture: Callable[[dict[Cell, list[Outcome]]], Any] | None = None,
) -> None:
    """Train all cells with all seeds, report, and save the results.

    run: Train one cell with a seed, so many steps, on the data of a path.
    cells: Return the networks to be trained.
    report: Print the outcomes of each cell, in the order of the seeds, and return their part of the result file.
    doc: The claim's docstring, printed by --help; its first line is the claim.
    seeds, steps: Defaults of the command line.
    path: The option that names other data, and its description.
    quick_steps: The steps of --quick, which trains with two seeds.
    picture: Draw the outcomes, for an image beside the result file.
    """
    options = parser(doc, seeds=seeds, steps=steps, path=path).parse_args()
    if options.quick:
        options.seeds, options.steps = 2, quick_steps
    content = head(doc)
    chosen = cells(options)
    jobs = [(cell, seed, options.steps, options.path) for seed in range(options.seeds) for cell in chosen]
    outcomes = in_parallel(run, jobs, "trainings")
    content |= {"steps": options.steps, "seeds": options.seeds, "threads_per_training": 1}
    by_cell = {cell: outcomes[number :: len(chosen)] for number, cell in enumerate(chosen)}
    content |= report(by_cell, options)
    if options.json:
        command.save(options.json, content, functools.partial(picture, by_cell) if picture else None)


def head(doc: str | None) -> dict[str, Any]:
    """Return the claim and the machine; call it before the load is our own."""
    return {"claim": (doc or "").splitlines()[0], **environment()}


def data_name(path: str | None) -> str:
    return Path(path).name if path else "scikit-learn digits"
