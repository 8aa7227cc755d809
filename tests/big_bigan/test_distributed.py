"""Two ranks with half the pairs each, against one process with all pairs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paper_layers.big_bigan import BigBiGANDiscriminator, LatentHead, discriminator_step, encoder_generator_step


class Encoder(LatentHead):
    """Return means, so ranks need not draw the same numbers."""

    def forward(self, features: Tensor) -> Any:
        return super().forward(features).mean


def players() -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    discriminator = BigBiGANDiscriminator(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), 5, 3, hidden_features=8, depth=2)
    return discriminator.double(), Encoder(6, 3, hidden_features=8, depth=2).double(), nn.Linear(3, 6).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 6, dtype=torch.double), torch.randn(8, 3, dtype=torch.double)


def train(trio: Any, images: Tensor, latents: Tensor) -> list[list[Tensor | None]]:
    """Return all players' gradients and the spectral norms' vectors after each of three steps."""
    found = []
    options: Any
    for step, options in (
        (discriminator_step, {"r1_gamma": 2.0}),
        (encoder_generator_step, {}),
        (discriminator_step, {}),
    ):
        for player in trio:
            player.zero_grad()
        step(*trio, images, latents, **options).loss.backward()
        parameters = [p for player in trio for p in player.parameters()]
        grads = [None if p.grad is None else p.grad.clone() for p in parameters]
        found.append([*grads, *(buffer.clone() for buffer in trio[0].buffers())])
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p -= 0.1 * p.grad
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    trio = [DistributedDataParallel(player) for player in players()]
    torch.save(train(trio, *(part.chunk(2)[rank] for part in batch())), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_are_one_process(tmp_path: Path) -> None:
    """Gradients, also of the R1 penalty, and spectral norms agree over three consecutive steps."""
    os.environ.setdefault("MASTER_ADDR", "localhost")
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    expected = train(players(), *batch())
    assert (
        sum(grad is None for grad in expected[0]) == len([*Encoder(6, 3, hidden_features=8, depth=2).parameters()]) + 2
    )
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for one, other in zip(found, expected, strict=True):
            assert [grad is None for grad in one] == [grad is None for grad in other]
            for a, b in zip(one, other, strict=True):
                if b is not None:
                    torch.testing.assert_close(a, b)
