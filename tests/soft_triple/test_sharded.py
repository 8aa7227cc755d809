"""One to three ranks, with different numbers of rows and classes, against one process with all of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from paper_layers.soft_triple import ShardedSoftTripleLoss, SoftTripleLoss, load_official, param_groups

DIM, FEATURES = 4, 5
SIZES = {1: (7,), 2: (5, 3), 3: (5, 0, 2)}  # Rows per rank.
CASES: dict[str, dict[str, Any]] = {
    "mean": {"num_classes": 7, "centers_per_class": 3, "chunk_size": 2},
    "sum": {"num_classes": 7, "centers_per_class": 3, "reduction": "sum", "margin": 0.3},
    "none": {"num_classes": 7, "centers_per_class": 3, "reduction": "none"},
    "no regulariser": {"num_classes": 5, "centers_per_class": 2, "tau": 0},
    "one center": {"num_classes": 5, "centers_per_class": 1, "la": 5},
    "fewer classes than ranks": {"num_classes": 2, "centers_per_class": 2},
    "all ignored": {"num_classes": 7, "centers_per_class": 3},
}


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, DIM).to(dtype)


def plain(case: str) -> SoftTripleLoss:
    torch.manual_seed(1)
    return SoftTripleLoss(embedding_dim=DIM, **CASES[case], dtype=torch.float64)


def batch(case: str, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, FEATURES, dtype=torch.float64, generator=generator)
    labels = torch.randint(CASES[case]["num_classes"], (rows,), generator=generator)
    labels[[0, -1]] = -100
    return x, labels.fill_(-100) if case == "all ignored" else labels


def total(case: str, loss: Tensor, ranks: int = 1) -> Tensor:
    """Return a scalar whose mean over ranks is the joint value; rows get different weights."""
    return loss if case != "none" else (ranks * loss * torch.arange(1, 1 + len(loss))).sum()


def one_process(case: str, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
    net, loss = network(), plain(case)
    x, labels = batch(case, sum(sizes))
    value = loss(net(x), labels)
    weighed = [total(case, part) for part in value.split(list(sizes))] if case == "none" else [value]
    torch.stack(weighed).sum().backward()
    return value.detach(), loss.centers.grad, [p.grad for p in net.parameters()]


def parallel(net: nn.Module, group: dist.ProcessGroup) -> Any:
    return DistributedDataParallel(net, process_group=group)


def sharded(case: str, group: dist.ProcessGroup) -> ShardedSoftTripleLoss:
    loss = ShardedSoftTripleLoss(embedding_dim=DIM, **CASES[case], dtype=torch.float64, process_group=group)
    loss.load_state_dict(plain(case).state_dict())  # All classes, on each rank.
    return loss


def compare(case: str, group: dist.ProcessGroup, rank: int, sizes: tuple[int, ...]) -> None:
    expected, center_grad, grads = one_process(case, sizes)
    net, loss, whole = parallel(network(), group), sharded(case, group), plain(case)
    assert torch.equal(loss.centers.full_tensor(), whole.centers)
    x, labels = (t.split(list(sizes))[rank] for t in batch(case, sum(sizes)))
    value = loss(net(x), labels.int())
    mine = expected.split(list(sizes))[rank] if case == "none" else expected
    torch.testing.assert_close(value, mine, rtol=1e-12, atol=1e-12)
    total(case, value, len(sizes)).backward()
    torch.testing.assert_close(loss.centers.grad.full_tensor(), center_grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close([p.grad for p in net.module.parameters()], grads, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.get_logits(net(x)), whole.get_logits(net(x)))
    assert torch.equal(loss.distinct_centers(0.7), whole.distinct_centers(0.7))
    torch.testing.assert_close(loss.merge_centers(0.7), whole.merge_centers(0.7))


def unequal_losses(group: dist.ProcessGroup, rank: int, sizes: tuple[int, ...]) -> None:
    """The centers' gradient is that of the mean over ranks of the losses; half precision is summed in float32."""
    x, labels = batch("mean", sum(sizes))
    loss = sharded("mean", group)
    own = [t.split(list(sizes))[rank] for t in (x, labels)]
    (loss(network()(own[0]), own[1]) * (1 + rank)).backward()
    torch.testing.assert_close(loss.centers.grad.full_tensor(), one_process("mean", sizes)[1] * (1 + len(sizes)) / 2)

    every = network(torch.bfloat16)(x.bfloat16()).detach().requires_grad_()
    plain("mean")(every, labels).backward()
    half = every.detach().split(list(sizes))[rank].requires_grad_()
    loss(half, own[1]).backward()
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad, len(sizes) * every.grad.split(list(sizes))[rank], rtol=2**-7, atol=1e-9)


def wrong_arguments(group: dist.ProcessGroup, rank: int, ranks: int) -> None:
    loss, x, labels = sharded("mean", group), torch.ones(2, DIM, dtype=torch.float64), torch.tensor([0, 6])
    first = rank == 0
    with pytest.raises(ValueError, match="labels: expected classes from 0 to 6 or ignore_index, -100, got 7"):
        loss(x, labels + int(first))
    with pytest.raises(TypeError if first else ValueError, match="int64" if first else "the error of rank 0"):
        loss(x, labels.double() if first else labels)
    with pytest.raises(TypeError if first else ValueError, match="indices_tuple" if first else "the error of rank 0"):
        loss(x, labels, labels if first else None)
    with pytest.raises(ValueError, match="ref_emb: expected None" if first else "the error of rank 0"):
        loss(x, labels, ref_emb=x.clone() if first else None)
    with pytest.raises((IndexError, RuntimeError) if first else ValueError, match="ind" if first else "of rank 0"):
        loss(x, labels, (labels,) if first else None)
    if ranks > 1:
        with pytest.raises(TypeError, match="the dtype of rank 1" if first else "float32, got torch.float64"):
            loss(x.float() if first else x, labels)
        with pytest.raises(RuntimeError):
            parallel(nn.ModuleList([network(), loss]), group)
    assert torch.isfinite(loss(x, labels))


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "num_classes": (5, 6),
    "centers_per_class": (2, 3),
    "embedding_dim": (4, 5),
    "la": (20.0, 19.5),
    "gamma": (0.1, 0.2),
    "tau": (0.2, 0.0),
    "margin": (0.01, 0.3),
    "ignore_index": (-100, 3),
    "reduction": ("mean", "sum"),
    "dtype of centers": (torch.float32, torch.float64),
    "embeddings.requires_grad": (True, False),
    "centers.requires_grad": (True, False),
}


def different_settings(group: dist.ProcessGroup, rank: int) -> None:
    """Every rank's error lists all ranks' settings, and no rank hangs."""
    for name, values in DIFFERENT.items():
        own = values[rank]
        settings: dict[str, Any] = {"num_classes": 5, "embedding_dim": 4}
        settings |= {"dtype": own} if name == "dtype of centers" else {} if "." in name else {name: own}
        loss = ShardedSoftTripleLoss(**settings, process_group=group)
        if name.startswith("centers."):
            loss.centers.requires_grad_(own)
        x = torch.randn(3, loss.embedding_dim, requires_grad=name != "embeddings.requires_grad" or own)
        with pytest.raises(
            ValueError, match=f"{name}: expected the same on all ranks, got {values[0]} on rank 0, {values[1]} o"
        ):
            loss(x, torch.tensor([0, 1, 2]))
        if "requires_grad" in name:
            with torch.no_grad():
                assert loss(x, torch.tensor([0, 1, 2])).isfinite()


def miners(group: dist.ProcessGroup, rank: int, sizes: tuple[int, ...]) -> None:
    """Rows found by one rank's miner have the same weights as in one process, also if other ranks have no miner."""
    x, labels = batch("mean", sum(sizes))
    tuples = [torch.tensor([1, 0, 1, 4]), torch.tensor([2, 3, 0, 1])]
    expected = plain("mean")(network()(x), labels, tuples)
    x, labels = (t.split(list(sizes))[rank] for t in (x, labels))
    value = sharded("mean", group)(network()(x), labels, tuples if rank == 0 else None)
    torch.testing.assert_close(value, expected)


class Whole(nn.Module):
    """Network and loss in one module, such as a LightningModule."""

    def __init__(self, loss: SoftTripleLoss):
        super().__init__()
        self.net, self.loss = network(), loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.net(x), labels)


def inside_ddp(group: dist.ProcessGroup, rank: int, sizes: tuple[int, ...]) -> None:
    _, center_grad, grads = one_process("mean", sizes)
    whole = Whole(sharded("mean", group))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(whole, ["loss.centers"])
    x, labels = (t.split(list(sizes))[rank] for t in batch("mean", sum(sizes)))
    wrapped = parallel(whole, group)
    wrapped(x, labels).backward()
    torch.testing.assert_close(whole.loss.centers.grad.full_tensor(), center_grad)
    torch.testing.assert_close([p.grad for p in whole.net.parameters()], grads)


def sharded_by_fsdp(group: dist.ProcessGroup) -> None:
    """Outside of forward, FSDP keeps only a part of the centers on each rank."""
    expected, x = plain("mean"), batch("mean", 4)[0][:, :DIM]
    mesh = DeviceMesh.from_group(group, "cpu")
    loss = fully_shard(plain("mean"), mesh=mesh)
    for call in (
        lambda loss: loss.get_logits(x),
        lambda loss: loss.distinct_centers(0.7),
        lambda loss: loss.merge_centers(0.7),
        lambda loss: loss(x, torch.tensor([0, 1, 6, 2])),
        lambda loss: loss.merge_centers(0.7),
    ):
        torch.testing.assert_close(call(loss), call(expected))
        loss.reshard()
    by_hand = plain("mean")
    by_hand.centers = nn.Parameter(distribute_tensor(by_hand.centers.detach(), mesh, [Shard(0)]))
    torch.testing.assert_close(by_hand.get_logits(x), expected.get_logits(x))
    with pytest.raises(TypeError, match="centers: expected a Tensor, got a DTensor"):
        by_hand(x, torch.tensor([0, 1, 6, 2]))


def initial_centers(group: dist.ProcessGroup) -> None:
    """Ranks with the same seed draw different centers, with the bound of all classes."""
    torch.manual_seed(5)
    loss = ShardedSoftTripleLoss(600, DIM, 2, process_group=group)
    every = loss.centers.full_tensor().detach().clone()
    assert every.flatten().unique().numel() > 4000
    assert 0.99 < every.abs().max() * (600 * 2) ** 0.5 <= 1
    assert loss.centers.to_local().shape == (len(loss.classes), 2, DIM)
    assert f"classes={loss.classes.start} to" in repr(loss)
    meta = ShardedSoftTripleLoss(600, DIM, 2, device="meta", process_group=group)
    assert meta.centers.is_meta
    meta.to_empty(device="cpu")
    meta.reset_parameters()
    assert meta.centers.full_tensor().abs().max() <= (600 * 2) ** -0.5
    copied = copy.deepcopy(loss)
    official = {"fc": torch.randn(DIM, 1200)}
    assert torch.equal(load_official(loss, official).centers.full_tensor()[599, 1], official["fc"][:, -1])
    assert torch.equal(copied.centers.full_tensor(), every)


Trained = tuple[nn.Module, torch.optim.Optimizer]


def with_optimizer(net: Any, loss: SoftTripleLoss) -> Trained:
    optimizer = torch.optim.Adam(param_groups(net, loss), eps=0.01, weight_decay=1e-4)
    return nn.ModuleDict({"net": getattr(net, "module", net), "loss": loss}), optimizer


def step(net: nn.Module, loss: SoftTripleLoss, x: Tensor, labels: Tensor) -> Trained:
    trained = with_optimizer(net, loss)
    loss(net(x), labels).backward()
    trained[1].step()
    return trained


def save(group: dist.ProcessGroup, rank: int, folder: str) -> None:
    x, labels = (t.split([5, 3])[rank] for t in batch("mean", 8))
    model, state = get_state_dict(*step(parallel(network(), group), sharded("mean", group), x, labels))
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=f"{folder}/checkpoint", process_group=group)


def load_and_check(folder: str, loss: SoftTripleLoss, group: dist.ProcessGroup | None) -> None:
    trained = with_optimizer(network(), loss)
    model, state = get_state_dict(*trained)
    content = {"model": model, "optimizer": state}
    dcp.load(content, checkpoint_id=f"{folder}/checkpoint", process_group=group, no_dist=group is None)
    set_state_dict(*trained, model_state_dict=model, optim_state_dict=state)
    reference = plain("mean")
    _, optimizer = step(network(), reference, *batch("mean", 8))
    moments = [
        [o.state[p][name] for name in ("exp_avg", "exp_avg_sq")]
        for o, p in ((trained[1], loss.centers), (optimizer, reference.centers))
    ]
    found = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (loss.centers, *moments[0])]
    torch.testing.assert_close(found, [reference.centers, *moments[1]])


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=3)
    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    try:
        group, ranks = (pair, 2) if rank < 2 else (single, 1)
        for some, count in ((group, ranks), (dist.group.WORLD, 3)):
            number = dist.get_rank(some)
            for case in CASES:
                compare(case, some, number, SIZES[count])
            unequal_losses(some, number, SIZES[count])
            wrong_arguments(some, number, count)
            initial_centers(some)
            miners(some, number, SIZES[count])
            inside_ddp(some, number, SIZES[count])
            sharded_by_fsdp(some)
        if ranks == 2:
            different_settings(group, rank)
            save(group, rank, folder)
        dist.barrier()
        load_and_check(folder, sharded("none", dist.group.WORLD), dist.group.WORLD)
        if ranks == 1:
            load_and_check(folder, sharded("none", group), group)
            load_and_check(folder, plain("none"), None)
    finally:
        dist.destroy_process_group()


def test_ranks_are_one_process(tmp_path: Path) -> None:
    """Test three ranks together, two of them, and one alone."""
    mp.spawn(worker, (str(tmp_path),), nprocs=3)


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        ShardedSoftTripleLoss(10, DIM)
