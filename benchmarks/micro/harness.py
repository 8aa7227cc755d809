"""Time contenders against each other and against the machine's limit.

- Each contender has its own process, which stays alive. The processes take turns measuring, never two at once, so one
  contender's thread pools, compiled code or fragmented heap can't slow another.
- The limit of a case is the time to copy as many bytes as any implementation must read and write. It is timed as
  another contender, so it runs in the cache if the case fits into it.
- All processes keep freed memory, and touch enough of it beforehand. Otherwise the system would map new pages for each
  large tensor, and the benchmark would time page faults, which cost more than the operation.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

Inputs = tuple[Any, ...]

WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",  # glibc: large tensors come from the heap ...
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),  # ... and the heap is kept.
    "KINETO_LOG_LEVEL": "99",  # Silence the profiler that counts bytes.
}


_RESERVE = 4  # Heap touched beforehand, in units of the case's bytes; enough to avoid page faults.


@dataclass(frozen=True)
class Case:
    """One set of inputs, timed in forward only (without autograd) or in forward and backward."""

    params: dict[str, Any]  # Arguments for `inputs`; names and values are the columns of the result.
    inputs: Callable[[Case], Inputs]  # Makes the inputs; tensors that require gradients get them.
    moved: int  # Bytes that any implementation must read and write.
    backward: bool
    device: str = "cpu"
    memory: bool = True  # Measure memory, too, which takes longer than a small case.

    @property
    def title(self) -> str:
        values = " ".join(str(value) for value in self.params.values())
        return f"{values} {'forward+backward' if self.backward else 'forward'}"


@dataclass(frozen=True)
class Contender:
    """A way to compute something: a top-level function of a module, called with a case's inputs."""

    name: str
    function: Callable[..., Tensor]
    role: str  # "ours"; "peer": computes the same; "other": something else, for comparison; "limit".
    compiled: bool = False  # Run it through torch.compile.
    inputs: Callable[[Case], Inputs] | None = None  # Replaces the case's inputs.
    keeps_heap: bool = True  # False: glibc's defaults, which map tensors over 32 MB anew each time.


@dataclass(frozen=True)
class Result:
    """Result of one contender in one case: seconds and bytes, or the error."""

    case: str
    params: dict[str, Any]
    backward: bool
    threads: int
    contender: str
    role: str
    median: float = math.nan
    iqr: float = math.nan
    measurements: int = 0
    to_limit: float = math.nan  # Median over the limit's median.
    to_ours: float = math.nan  # Median over our median.
    saved: int = 0  # Bytes kept for the backward pass beyond the inputs.
    peak: int = 0  # Peak bytes beyond the inputs, including output and gradients.
    checksum: float = math.nan
    error: str = ""


def _copy(target: Tensor, source: Tensor) -> Tensor:
    return target.copy_(source)


def _copy_inputs(case: Case) -> Inputs:
    source = torch.rand(max(case.moved // 8, 1), device=case.device)  # Four bytes, read and written once.
    return torch.zeros_like(source), source


LIMIT = Contender("limit: copy", _copy, "limit", inputs=_copy_inputs)


class _Task:
    """A contender prepared for a case, in the worker process."""

    def __init__(self, contender: Contender, case: Case):
        torch.manual_seed(0)
        torch.compiler.reset()
        if case.device == "cpu":
            torch.ones(_RESERVE * case.moved, dtype=torch.uint8)
        self.case = case
        self.inputs = (contender.inputs or case.inputs)(case)
        self.function: Callable[..., Tensor] = contender.function
        if contender.compiled:
            self.function = torch.compile(contender.function, dynamic=False)
        self.leaves = [t for t in self.inputs if isinstance(t, Tensor) and t.requires_grad]
        self.backward = case.backward and bool(self.leaves)
        with torch.set_grad_enabled(self.backward):
            output = self.function(*self.inputs)
        self.grad = torch.randn_like(output)
        self.checksum = output.detach().abs().mean(dtype=torch.float64).item()
        del output
        self.run()

    def run(self) -> None:
        if self.backward:
            torch.autograd.grad(self.function(*self.inputs), self.leaves, self.grad, allow_unused=True)
        else:
            with torch.no_grad():
                self.function(*self.inputs)

    def measure(self, seconds: float) -> list[float]:
        timer = Timer("run()", globals={"run": self.run}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=seconds).times

    def saved(self) -> int:
        if not self.backward:
            return 0
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self.function(*self.inputs)
        for tensor in self.inputs:
            if isinstance(tensor, Tensor):
                storages.pop(tensor.untyped_storage().data_ptr(), None)
        del output
        return sum(storage.nbytes() for storage in storages.values())

    def peak(self) -> int:
        if self.case.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.run()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.run()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            profile.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        allocations = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
        held = highest = 0
        for event in allocations:
            held += event["args"]["Bytes"]
            highest = max(highest, held)
        return highest


def _worker(pipe: Connection, contender: Contender, threads: int) -> None:
    """Answer requests until the pipe closes: a Case to prepare, or the seconds of a round."""
    torch.set_num_threads(threads)
    task = None
    with contextlib.suppress(EOFError):
        while True:
            request = pipe.recv()
            try:
                if isinstance(request, Case):
                    task = None  # Free the last one first.
                    task = _Task(contender, request)
                    memory = (task.saved(), task.peak()) if request.memory else (0, 0)
                    pipe.send((*memory, task.checksum))
                elif task is not None:
                    pipe.send(task.measure(request))
            except Exception as error:
                task = None
                pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


class _Process:
    """The parent's connection to a worker."""

    def __init__(self, contender: Contender, threads: int):
        self.contender, self.threads = contender, threads
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        arguments = (other, self.contender, self.threads)
        self.process = context.Process(target=_worker, args=arguments, daemon=True)
        kept = {n: v for n, v in WORKER_ENVIRONMENT.items() if self.contender.keeps_heap or "MALLOC" not in n}
        with patch.dict(os.environ, {**kept, "OMP_NUM_THREADS": str(self.threads)}):
            self.process.start()
        other.close()

    def ask(self, request: Case | float) -> Any:
        """Return the worker's answer, or its error as a string; replace a worker that died."""
        try:
            self.pipe.send(request)
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self._start()
            return f"its process died with exit status {code}"

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


@dataclass(frozen=True)
class Comparison:
    """Contenders measured on the same cases, and the time to spend."""

    contenders: Sequence[Contender]
    cases: Sequence[Case]
    limit: Contender = LIMIT
    rounds: int = 5
    seconds: float = 0.3  # Seconds per round.


def compare(comparison: Comparison, threads: int) -> list[Result]:
    """Run every contender on every case, taking turns over several rounds."""
    if not comparison.cases:
        return []
    processes = [_Process(contender, threads) for contender in (*comparison.contenders, comparison.limit)]
    results = []
    rounds, seconds = comparison.rounds, comparison.seconds
    total = len(comparison.cases) * (rounds + 1) * len(processes)
    try:
        with tqdm(total=total, desc=f"{threads} threads", unit="round") as bar:
            for case in comparison.cases:
                results += _compare(processes, case, rounds, seconds, bar)
    finally:
        for process in processes:
            process.close()
    return results


def _compare(processes: list[_Process], case: Case, rounds: int, seconds: float, bar: Any) -> list[Result]:
    facts: dict[str, Any] = {}
    times: dict[str, list[float]] = {}
    for turn in range(rounds + 1):  # Round 0 prepares.
        for process in processes:
            name = process.contender.name
            bar.set_postfix_str(f"{case.title}, {name}")
            if turn == 0:
                facts[name], times[name] = process.ask(case), []
            elif not isinstance(facts[name], str):
                answer = process.ask(seconds)
                if isinstance(answer, str):
                    facts[name] = answer
                else:
                    times[name] += answer
            time.sleep(0.01)  # Wait until the last contender's threads stop spinning.
            bar.update()

    medians = {name: statistics.median(values) for name, values in times.items() if values}
    ours, limit = (next(p.contender.name for p in processes if p.contender.role == role) for role in ("ours", "limit"))
    results = []
    for process in processes:
        name = process.contender.name
        row: dict[str, Any] = {"params": case.params, "backward": case.backward, "threads": process.threads}
        row |= {"contender": name, "role": process.contender.role}
        if isinstance(facts[name], str):
            row["error"] = facts[name]
        else:
            quartiles = statistics.quantiles(times[name], n=4) if len(times[name]) > 1 else [math.nan] * 3
            saved, peak, checksum = facts[name]
            row |= {"median": medians[name], "iqr": quartiles[2] - quartiles[0], "measurements": len(times[name])}
            row |= {"to_limit": medians[name] / medians.get(limit, math.nan)}
            row |= {"to_ours": medians[name] / medians.get(ours, math.nan)}
            row |= {"saved": saved, "peak": peak, "checksum": checksum}
        results.append(Result(case.title, **row))
    return results


def train_alone(train: Callable[..., dict[str, Any]], threads: int, *arguments: Any) -> dict[str, Any]:
    """Run `train` in a separate process, and add the process's peak memory to its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_peak, train, threads, arguments).result()


def _with_peak(train: Callable[..., dict[str, Any]], threads: int, arguments: Sequence[Any]) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = train(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"threads": threads, **answer, "peak_gib": peak / 2**20, "start_gib": start / 2**20}
