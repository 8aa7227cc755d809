"""Fuzz all ops: python -m tests.fuzz [--minutes 5] [--seed 0] [--op knn], or --replay SEED --op knn for one draw."""

from __future__ import annotations

import argparse
import collections
import os
import signal
import subprocess
import sys
import time
import warnings

import torch

from tests.fuzz.check import problems
from tests.fuzz.ops import OPS, Draw


def draw_once(op: str, seed: int) -> list[str]:
    """Describe the fault of one draw; the first line is the call."""
    draw = Draw(seed)
    call = OPS[op](draw)
    found = [*problems(call, draw, seed)]
    return [str(call), *found] if found else []


def work(names: list[str], seed: int, end: float) -> None:
    """Draw until the time is over; announce each draw, so the parent knows which one killed the process."""
    while time.time() < end:
        for name in names:
            print(f"draw {name} {seed}", flush=True)
            try:
                found = draw_once(name, seed)
            except Exception as error:
                found = ["", f"{type(error).__name__}: {error}"]
            for line in found:
                print(f"    {line}", flush=True)
        seed += 1


def watch(names: list[str], seed: int, minutes: float) -> int:
    """Run `work` in a separate process, restart it after a crash, and return the number of failed draws."""
    end, draws, failed = time.time() + 60 * minutes, collections.Counter[str](), collections.Counter[str]()
    while time.time() < end:
        command = [sys.executable, "-m", "tests.fuzz", "--work", str(end), "--seed", str(seed), "--op", *names]
        # Waiting threads must not block others: there are more threads than cores.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        op, lines = "", 0
        for line in worker.stdout or ():
            if line.startswith("draw "):
                _, op, last = line.split()
                seed, lines = int(last), 0
                draws[op] += 1
                continue
            if not lines:
                failed[op] += 1
                print(f"{op}, --replay {seed} --op {op}")
            lines += 1
            print(line, end="", flush=True)
        if code := worker.wait():
            failed[op] += 1
            name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            print(f"{op}, --replay {seed} --op {op}\n    the process ended with {name}", flush=True)
            seed += 1
    print(", ".join(f"{op}: {failed[op]} of {count}" for op, count in draws.items()), "failed")
    return failed.total()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--replay", type=int)
    parser.add_argument("--work", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.work is not None:
        work(arguments.op, arguments.seed, arguments.work)
        return 0
    if arguments.replay is None:
        return min(1, watch(arguments.op, arguments.seed, arguments.minutes))
    torch.set_printoptions(precision=9)
    found = [line for op in arguments.op for line in draw_once(op, arguments.replay)]
    print("\n    ".join(found) or "nothing found")
    return min(1, len(found))


if __name__ == "__main__":
    sys.exit(main())
