"""Two ranks, each with its own cloud, against one process with both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paper_layers.deep_gcn import DeepGCN, EdgeConv
from tests.ops.test_neighbor_reduce import features

SIZES = (40, 56)  # Uneven, so ranks must weight their statistics.


def network(order: str = "act_norm") -> nn.Module:
    torch.manual_seed(0)
    return DeepGCN(6, 3, channels=8, blocks=3, k=4, stochastic=False, dropout=0, order=order).double()


def clouds() -> list[Tensor]:
    return [features(n, 6, seed=n).double() for n in SIZES]


def worker(rank: int, folder: str, order: str, synchronized: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    net: Any = network(order)
    x = clouds()[rank]
    if synchronized:  # DDP takes SyncBatchNorm on GPUs only.
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        output = net(x)
        output.square().sum().backward()
        for p in net.parameters():
            dist.all_reduce(p.grad)
    else:
        net = DistributedDataParallel(net.eval())
        output = net(x)
        output.square().sum().backward()
        for p in net.parameters():
            p.grad *= 2  # DDP takes the mean over ranks.
        net = net.module
    torch.save((output, [p.grad for p in net.parameters()], list(net.buffers())), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("order", "synchronized"), [("act_norm", True), ("norm_act", True), ("act_norm", False)])
def test_ranks_are_one_process(order: str, synchronized: bool, tmp_path: Path) -> None:
    os.environ.setdefault("MASTER_ADDR", "localhost")
    mp.spawn(worker, (str(tmp_path), order, synchronized), nprocs=2)
    net = network(order).train(synchronized)
    ptr = torch.tensor([0, SIZES[0], sum(SIZES)])
    expected = net(torch.cat(clouds()), ptr=ptr)
    expected.square().sum().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), expected)
    for _, grads, buffers in parts:
        torch.testing.assert_close(grads, [p.grad for p in net.parameters()])
        torch.testing.assert_close(buffers, list(net.buffers()))


def worker_without_edges(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    conv: Any = nn.SyncBatchNorm.convert_sync_batchnorm(EdgeConv(6, 3).double())
    results = []
    for sizes in ((20, 0), (20, 1), (0, 0)):  # Edges of each rank. One edge is enough where another rank has edges.
        index = torch.full((20, 1), -1)
        index[: sizes[rank]] = 3
        output = conv(features(20, 6).double(), index)
        output.square().sum().backward()
        results.append([p.grad.clone() for p in conv.parameters()] + [b.clone() for b in conv.buffers()])
    torch.save((output, results), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_rank_without_edges(tmp_path: Path) -> None:
    os.environ.setdefault("MASTER_ADDR", "localhost")
    mp.spawn(worker_without_edges, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    conv = EdgeConv(6, 3).double()
    index = torch.full((20, 1), 3)
    conv(features(20, 6).double(), index)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for output, (first, second, third) in parts:
        torch.testing.assert_close(first[-3:], list(conv.buffers()))
        torch.testing.assert_close(third[-3:-1], second[-3:-1])
        assert torch.equal(output, torch.zeros_like(output))
        assert all(tensor.isfinite().all() for tensor in third)
