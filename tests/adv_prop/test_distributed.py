"""Two ranks, each with its own batch, against one process with both batches."""

from __future__ import annotations

import contextlib
import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from paper_layers import swap
from paper_layers.adv_prop import SplitSyncBatchNorm, adv_prop_loss, fast_adv_prop_backward, pgd, use_split

EVEN, UNEVEN, SINGLE = (4, 4), (2, 5), (1, 1)  # Numbers of images per rank.
SIZES = (EVEN, UNEVEN, SINGLE)
attack = functools.partial(pgd, radius=8, step_size=4, steps=2, bounds=(0, 1), random_start=0, targeted=False)
Record = dict[str, Any]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6)]
    layers += [nn.BatchNorm1d(6, momentum=None), nn.ReLU(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def data(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [(torch.rand(n, 3, 5, 5, generator=generator).double(), torch.arange(n) % 3) for n in sizes]
    return [(x * (1 + rank) / len(sizes), y) for rank, (x, y) in enumerate(made)]  # Each rank has other statistics.


def norm() -> SplitSyncBatchNorm:
    made = SplitSyncBatchNorm(3, dtype=torch.float64)
    for parameter, value in zip(made.parameters(), (2.0, -1.0, 0.5, 3.0), strict=True):
        parameter.data.fill_(value)
    return made


def features(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Draw the two halves of each rank's batch, far from zero and different; single images have one pixel."""
    generator, side = torch.Generator().manual_seed(2), 1 if sizes == SINGLE else 2
    return [
        (
            (1 + rank) * torch.randn(n, 3, side, side, generator=generator).double() + 1000 * rank,
            torch.randn(n, 3, side, side).double(),
        )
        for rank, n in enumerate(sizes)
    ]


def record(model: nn.Module, **more: Any) -> Record:
    return {"grads": [p.grad for p in model.parameters()], "state": copy.deepcopy(model.state_dict()), **more}


def run_norm(model: Any, halves: list[tuple[Tensor, Tensor]]) -> Record:
    """Run the norm on clean and adversarial halves, then one split on a whole batch."""
    parts = [torch.cat([half[i] for half in halves]) for i in (0, 1)]
    x = torch.cat(parts).requires_grad_()
    output = model(x)
    weights = torch.linspace(-1, 1, 3).view(3, 1, 1).double()
    (output.square() * weights).sum().backward()
    with use_split(model, 1):
        one = model(parts[0])
    rows = [len(part) for part in parts]
    return record(model, output=output.split(rows), grad=x.grad.split(rows), one=one)


def sizes_of(rank: int) -> dict[str, list[int]]:
    """Return the sizes of the splits: a rank, a split, and a split on one rank, without images."""
    return {"rank": [[3, 2], [0, 0]][rank], "split": [[3, 0], [4, 0]][rank], "one": [[3, 2], [4, 0]][rank]}


def run_empty(model: Any, halves: list[Tensor]) -> Record:
    model.split_sizes = tuple(len(half) for half in halves)
    x = torch.cat(halves).requires_grad_()
    output = model(x)
    output.square().sum().backward()
    return record(model, output=output.split(model.split_sizes), grad=x.grad.split(model.split_sizes))


def some(sizes: list[int], rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(n, 3, 2, 2, generator=generator).double() for n in sizes]


def error(call: Any) -> str:
    try:
        call()
    except ValueError as raised:
        return str(raised)
    return "none"


def run_step(model: Any, batches: list[tuple[Tensor, Tensor]]) -> Record:
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if isinstance(model, DistributedDataParallel):
        attack(model, x, y)  # The attack must not leave a reduction unfinished.
    for _ in range(2):
        loss = adv_prop_loss(model, x, y, attack)
        loss.backward()
    return record(getattr(model, "module", model), loss=loss, images=attack(model, x, y))


def run_fast(model: Any, batches: list[tuple[Tensor, Tensor]]) -> Record:
    """Run two steps, so that an unfinished reduction shows."""
    model.zero_grad()
    for x, y in [*batches, *batches]:
        generator = torch.Generator().manual_seed(0)
        fast_adv_prop_backward(model, x, y, radius=8, step_size=8, bounds=(0, 1), generator=generator)
    return record(getattr(model, "module", model))


def run_sharded(model: Any, shard: Any = None) -> Record:
    """Run a model with each norm sharded by itself, in all splits, then in one split."""
    if shard is not None:
        for layer in [module for module in model.modules() if isinstance(module, _BatchNorm)][::-1]:
            shard(layer)
        shard(model)
    x, _ = data((4,))[0]
    outputs = [model(x)]
    with use_split(model, 1):
        outputs += [model(x), model.eval()(x)]
    torch.stack(outputs).square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    return {"outputs": outputs, "grads": [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for sizes in SIZES:
        torch.manual_seed(3)
        found["norm", sizes] = run_norm(norm(), [features(sizes)[rank]])
    for synchronized in (True, False):
        model = network()
        if synchronized:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = swap.split_batch_norm(model)
        ddp = DistributedDataParallel(model, broadcast_buffers=synchronized)
        found["step", synchronized] = run_step(ddp, [data(EVEN)[rank]])
        if not synchronized:
            found["fast"] = run_fast(ddp, [data(EVEN)[rank]])
    for name, own in sizes_of(rank).items():
        found["empty", name] = run_empty(norm(), some(own, rank))
    for name, batch in (("odd", 4 - rank), ("empty and odd", rank), ("one value", 2 * rank)):
        x = torch.randn(batch, 3, 1, 1).double()
        found["error", name] = error(functools.partial(norm(), x))
    apart = norm()
    with use_split(apart, 1) if rank else contextlib.nullcontext():
        found["error", "splits"] = error(lambda: apart(torch.randn(4, 3, 1, 1).double()))
    mesh = init_device_mesh("cpu", (2,))
    found["sharded"] = run_sharded(swap.split_batch_norm(network()), functools.partial(fully_shard, mesh=mesh))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Record]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("sizes", SIZES)
def test_parts_are_synchronised_each_by_itself(ranks: list[dict[Any, Record]], sizes: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    expected = run_norm(norm(), features(sizes))
    found = [rank["norm", sizes] for rank in ranks]
    for key in ("output", "grad"):
        for half in (0, 1):
            torch.testing.assert_close(torch.cat([part[key][half] for part in found]), expected[key][half])
    torch.testing.assert_close(torch.cat([part["one"] for part in found]), expected["one"])
    for grads in zip(*(part["grads"] for part in found), expected["grads"], strict=True):
        torch.testing.assert_close(grads[0] + grads[1], grads[2])
    for part in found:
        torch.testing.assert_close(part["state"], expected["state"])


def test_step_is_that_of_one_process(ranks: list[dict[Any, Record]]) -> None:
    expected = run_step(swap.split_batch_norm(network()), data(EVEN))
    found = [rank["step", True] for rank in ranks]
    for part in found:
        torch.testing.assert_close(part["grads"], expected["grads"])
        torch.testing.assert_close(part["state"], expected["state"])
    torch.testing.assert_close((found[0]["loss"] + found[1]["loss"]) / 2, expected["loss"])
    torch.testing.assert_close(torch.cat([part["images"] for part in found]), expected["images"])


def test_without_synchronisation_only_gradients_are_shared(ranks: list[dict[Any, Record]]) -> None:
    alone = [run_step(swap.split_batch_norm(network()), [data(EVEN)[rank]]) for rank in range(2)]
    for rank, part in enumerate(ranks):
        means = [(one + other) / 2 for one, other in zip(alone[0]["grads"], alone[1]["grads"], strict=True)]
        torch.testing.assert_close(part["step", False]["grads"], means)
        torch.testing.assert_close(part["step", False]["state"], alone[rank]["state"])


def test_fast_step_shares_its_gradients(ranks: list[dict[Any, Record]]) -> None:
    alone = []
    for batch in data(EVEN):
        model = swap.split_batch_norm(network())
        run_step(model, [batch])
        alone.append(run_fast(model, [batch])["grads"])
    means = [(one + other) / 2 for one, other in zip(*alone, strict=True)]
    for part in ranks:
        torch.testing.assert_close(part["fast"]["grads"], means)


@pytest.mark.parametrize("name", sizes_of(0))
def test_parts_without_images(ranks: list[dict[Any, Record]], name: str) -> None:
    """One process computes the same from all images; a split without images on any rank keeps its statistics."""
    parts = [some(sizes_of(rank)[name], rank) for rank in range(2)]
    expected = run_empty(norm(), [torch.cat(halves) for halves in zip(*parts, strict=True)])
    found = [rank["empty", name] for rank in ranks]
    for key in ("output", "grad"):
        for half in (0, 1):
            torch.testing.assert_close(torch.cat([part[key][half] for part in found]), expected[key][half])
    for grads in zip(*(part["grads"] for part in found), expected["grads"], strict=True):
        torch.testing.assert_close(grads[0] + grads[1], grads[2])
    for part in found:
        torch.testing.assert_close(part["state"], expected["state"])


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("odd", ["norms of every process can split, got 3 on rank 1", "num_splits=2 divides, got 3"]),
        ("empty and odd", ["norms of every process can split, got 1 on rank 1", "num_splits=2 divides, got 1"]),
        ("splits", ["expected the same splits in every process, got [[0, 1], [1]] by rank"] * 2),
        ("one value", ["at least 2 values per channel in each split over all processes, got [1, 1]"] * 2),
    ],
)
def test_errors_reach_every_rank(ranks: list[dict[Any, Any]], name: str, messages: list[str]) -> None:
    for rank, message in zip(ranks, messages, strict=True):
        assert message in rank["error", name]


def test_norms_that_are_sharded_each_by_itself(ranks: list[dict[Any, Record]]) -> None:
    expected = run_sharded(swap.split_batch_norm(network()))
    for rank in ranks:
        torch.testing.assert_close(rank["sharded"], expected)
