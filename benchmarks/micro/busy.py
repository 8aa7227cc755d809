"""Ops beside two busy neighbours, as data-loading workers are: how much slower, and not slower than one thread.

python -m benchmarks.micro.busy [--quick] [--json PATH]

Each case runs alone and beside two processes that never sleep, on two threads and on one.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks import command
from benchmarks.environment import environment
from benchmarks.micro import knn, lip, point_sample, soft_triple, split_batch_norm
from benchmarks.micro.harness import Case, Comparison, compare

COMPARISONS = (
    Comparison((knn.CONTENDERS[0], knn.CONTENDERS[5]), [knn.make_case((32, 1024, c, 16, 1)) for c in (3, 64)]),
    Comparison(lip.CONTENDERS[:2], [lip.make_case((8, 64, 56, 56), "NCHW", "float32", True)]),
    Comparison(point_sample.CONTENDERS, [point_sample.make_case("one map", 2048, "NCHW", True)]),
    Comparison((soft_triple.OURS, soft_triple.BLOCK_WISE),
               [Case({"B, d, C, K": (128, 512, 100, 10), "tau": 0.2}, soft_triple.inputs, 1 << 20, True)]),
    Comparison(split_batch_norm.CONTENDERS,
               [Case({"shape": (32, 64, 56, 56), "layout": "NCHW"}, split_batch_norm.inputs, 1 << 20, True)]),
)  # fmt: skip
MOST = 2.2, 1.1  # Beside neighbours: times the quiet time, and times one thread's.


def _burn() -> None:
    for _ in itertools.count():
        pass


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep so many processes busy."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_burn, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def main() -> None:
    """Measure as the command line says."""
    parser = command.parser(__doc__, "fewer rounds")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for comparison in COMPARISONS:
        rounds, seconds = (3, 0.2) if options.quick else (7, 0.5)
        run = replace(comparison, rounds=rounds, seconds=seconds)
        times: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
        for busy, threads in itertools.product((0, 2), (2, 1)):
            with neighbours(busy):
                for result in compare(run, threads):
                    if result.role != "limit" and not result.error:
                        times.setdefault((result.contender, result.case), {})[busy, threads] = result.median
        for (name, case), found in times.items():
            slower, to_one = found[2, 2] / found[0, 2], found[2, 2] / found[2, 1]
            rows.append({"contender": name, "case": case, "slower": slower, "to one thread": to_one}
                        | {f"{busy} neighbours, {n} threads": time for (busy, n), time in found.items()})  # fmt: skip
    head = ("", "quiet ms", "busy ms", "slower", "to one thread, busy")
    lines = [
        (f"{row['contender']}, {row['case']}", f"{row['0 neighbours, 2 threads'] * 1e3:.2f}",
         f"{row['2 neighbours, 2 threads'] * 1e3:.2f}", f"{row['slower']:.2f}", f"{row['to one thread']:.2f}")
        for row in rows
    ]  # fmt: skip
    print(command.text_table(head, lines))
    print(f"wanted of ours: at most {MOST[0]} times slower, {MOST[1]} times one thread")
    if options.json:
        command.save(options.json, {"benchmark": "busy", **environment(), "results": rows})


if __name__ == "__main__":
    main()
