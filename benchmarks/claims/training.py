"""Train and test models, several at once."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.micro.harness import WORKER_ENVIRONMENT

# Inputs and labels, both indexed by a tensor of numbers; a model returns class scores in the last dimension.
Data = tuple[Any, Any]
Result = TypeVar("Result")
Loss = Callable[[Any, Any], Tensor]


def train(
    model: nn.Module,
    data: Data,
    steps: int,
    seed: int,
    batch_size: int = 32,
    progress: str | None = None,
    loss: Loss | None = None,
) -> float:
    """Train with AdamW and a one-cycle schedule, and return the seconds; `progress` names a bar.

    Only the seed decides the order of batches. The loss takes inputs and labels; default: the model's cross-entropy.
    """

    def cross_entropy(inputs: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())

    loss = loss or cross_entropy
    inputs, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    model.train()
    start = time.perf_counter()
    for _ in tqdm(range(steps), progress, unit="step", disable=progress is None):
        batch = torch.randint(len(inputs), (batch_size,), generator=generator)
        value = loss(inputs[batch], labels[batch])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the accuracy in percent."""
    model.eval()
    inputs, labels = data
    right = count = 0
    for batch in torch.arange(len(inputs)).split(256):
        answers, wanted = model(inputs[batch]).argmax(-1), labels[batch]
        right += (answers == wanted).sum().item()
        count += wanted.numel()
    return 100 * right / count


def in_parallel(
    job: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], title: str, processes: int | None = None
) -> list[Result]:
    """Run the job for each tuple of arguments, with one single-threaded process per core and a progress bar."""
    context = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(processes or os.cpu_count(), context, torch.set_num_threads, (1,))
    with patch.dict(os.environ, WORKER_ENVIRONMENT), workers as pool:
        futures = [pool.submit(job, *values) for values in arguments]
        for future in tqdm(as_completed(futures), title, len(futures), unit="training"):
            future.result()  # Raises the job's error.
        return [future.result() for future in futures]


def two_thirds(count: int) -> tuple[Tensor, Tensor]:
    """Split the numbers below `count` into two thirds for training and one third for tests, the same every time."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    train, test = order.tensor_split([2 * count // 3])
    return train, test


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
