"""The loss in pytorch-metric-learning's trainer, tester, miners and wrappers."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pytorch_metric_learning.losses import BaseMetricLossFunction, MultipleLosses, NTXentLoss
from pytorch_metric_learning.losses import SoftTripleLoss as TheirLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from paper_layers.soft_triple import ShardedSoftTripleLoss, SoftTripleLoss, param_groups, recall_at_k


def data(seed: int) -> TensorDataset:
    """Draw four classes of two modes each in six features, and ten features of noise."""
    torch.manual_seed(seed)
    modes = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(8, (160,))
    return TensorDataset(torch.cat([2 * modes[labels], torch.zeros(160, 10)], 1) + torch.randn(160, 16), labels % 4)


def test_trainer_and_tester(capfd: pytest.CaptureFixture[str]) -> None:
    train, test = data(1), data(2)
    trunk, loss = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), SoftTripleLoss(4, 8, 2)
    trunk_group, center_group = param_groups(trunk, loss, lr=1e-2, center_lr=1e-2)
    before = loss.centers.clone()
    trainer = MetricLossOnly(
        {"trunk": trunk},
        {
            "trunk_optimizer": torch.optim.Adam([trunk_group]),
            "metric_loss_optimizer": torch.optim.Adam([center_group], eps=0.01),
        },
        batch_size=32,
        loss_funcs={"metric_loss": loss},
        dataset=train,
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
    )
    calculator = AccuracyCalculator(("precision_at_1",), k=1, device=torch.device("cpu"))
    tester = GlobalEmbeddingSpaceTester(
        dataloader_num_workers=0, data_device=torch.device("cpu"), accuracy_calculator=calculator
    )

    def precision() -> float:
        return tester.test({"test": test}, 0, trunk)["test"]["precision_at_1_level0"]

    untrained = precision()
    trainer.train(num_epochs=8)
    assert not torch.equal(loss.centers, before)
    assert precision() > untrained + 0.1
    embeddings, labels = tester.get_all_embeddings(test, trunk)
    assert precision() == pytest.approx(recall_at_k(embeddings, labels[:, 0])[1])
    capfd.readouterr()


def test_beside_other_losses() -> None:
    x, labels = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    ours, theirs = SoftTripleLoss(4, 4), NTXentLoss()
    both = MultipleLosses([ours, theirs], weights=[1, 0.5])
    torch.testing.assert_close(both(x, labels), ours(x, labels) + 0.5 * theirs(x, labels))


def theirs_like(ours: SoftTripleLoss) -> TheirLoss:
    """Make their loss with the same centers."""
    loss = TheirLoss(ours.num_classes, ours.embedding_dim, ours.centers_per_class, margin=ours.margin)
    loss.fc.data = ours.centers.detach().flatten(0, 1).T.clone()
    return loss


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4


@pytest.mark.parametrize("miner", [MultiSimilarityMiner(), TripletMarginMiner(), None])
def test_miners_weigh_rows(miner: nn.Module | None) -> None:
    x, labels = batch()
    ours = SoftTripleLoss(4, 4, tau=0)
    theirs = theirs_like(ours)
    tuples = miner(x, labels) if miner else tuple(torch.empty(0, dtype=torch.int64) for _ in range(3))
    expected = theirs(x, labels, tuples)
    assert (miner is None) == torch.equal(expected, theirs(x, labels))
    torch.testing.assert_close(ours(x, labels, tuples), expected)
    torch.testing.assert_close(ours(x, labels, tuple(part.int() for part in tuples)), expected)
    torch.testing.assert_close(MultipleLosses([ours], [miner])(x, labels), expected)
    # The weights don't change the regulariser.
    regularized = SoftTripleLoss(4, 4)
    regularized.load_state_dict(ours.state_dict())
    distance = regularized(x, labels) - ours(x, labels)
    torch.testing.assert_close(regularized(x, labels, tuples), expected + distance)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, labels, tuples), expected)
    none = SoftTripleLoss(4, 4)
    assert none(x[:0], labels[:0], tuple(part[:0] for part in tuples)) == 0


def test_called_as_their_losses_are() -> None:
    x, labels = batch()
    ours = SoftTripleLoss(4, 4)
    expected = ours(x, labels)
    for call in (
        lambda: ours(x, labels, None, None, None),
        lambda: ours(x, labels, ref_emb=None, ref_labels=None),
        lambda: ours(x, labels, ref_emb=x, ref_labels=labels),
        lambda: ours(embeddings=x, labels=labels, indices_tuple=None),
    ):
        assert call() == expected
    for dtype in (torch.int8, torch.int16, torch.int32, torch.uint8):
        assert ours(x, labels.to(dtype)) == expected
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda: ours(x, labels, None, x.clone()), ValueError, "ref_emb: expected None"),
        (lambda: ours(x, labels, None, x, labels.clone()), ValueError, "ref_labels: expected None"),
        (lambda: ours(x, labels[:, None]), ValueError, r"labels: expected shape \(12,\), got \(12, 1\)"),
        (lambda: ours(x, labels.float()), TypeError, "labels: expected an int64 Tensor, got torch.float32"),
        (lambda: ours(x, labels + 1), ValueError, "labels: expected classes from 0 to 3 .* got 4"),
        (lambda: ours(x, labels - 1), ValueError, "labels: expected classes from 0 to 3 .* got -1"),
        (lambda: ours(x, labels, labels), TypeError, "indices_tuple: expected Tensors in a tuple, got Tensor"),
        (lambda: ours(x, labels, (x,)), TypeError, "indices_tuple: expected an int64 Tensor of one dimension"),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()


class Mine(SoftTripleLoss):
    """A user's subclass."""


@pytest.mark.parametrize("kind", [SoftTripleLoss, Mine])
def test_is_one_of_their_losses(kind: type[SoftTripleLoss]) -> None:
    """It has no further attributes, parameters or submodules, and is copied and pickled by its own class."""
    loss = kind(4, 4)
    assert isinstance(loss, kind)
    assert isinstance(loss, BaseMetricLossFunction)
    assert loss.sub_loss_names() == ["loss"]
    assert [name for name, _ in loss.named_modules()] == [""]
    assert repr(loss).startswith(f"{kind.__name__}(4, 4, ")
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.load(buffer, weights_only=False)):
        assert type(twin) is type(loss)
        assert torch.equal(twin.centers, loss.centers)
        assert twin.centers is not loss.centers
        twin(*batch()).backward()
    script = (
        "import pickle, sys; loss = pickle.load(open(sys.argv[1], 'rb')); "
        "assert 'pytorch_metric_learning' not in sys.modules; print(type(loss).__mro__[1].__name__)"
    )
    if kind is SoftTripleLoss:
        with tempfile.NamedTemporaryFile() as file:
            pickle.dump(loss, file)
            file.flush()
            done = subprocess.run([sys.executable, "-c", script, file.name], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "Leaf"


def distributed(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        x, labels = batch()
        loss = SoftTripleLoss(4, 4)
        leaf = x.requires_grad_()
        own = slice(rank, None, 2)
        value = DistributedLossWrapper(loss)(leaf[own], labels[own])
        torch.testing.assert_close(value, 2 * loss(x, labels))
        (grad,) = torch.autograd.grad(value, leaf)
        (expected,) = torch.autograd.grad(loss(x, labels), leaf)
        torch.testing.assert_close(grad[own] / 2, expected[own])
        with pytest.raises(TypeError):
            DistributedLossWrapper(ShardedSoftTripleLoss(4, 4))
    finally:
        dist.destroy_process_group()


def test_distributed_wrapper(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="non-distributed"):
        assert DistributedLossWrapper(SoftTripleLoss(4, 4))(*batch()).isfinite()
    mp.spawn(distributed, (str(tmp_path),), nprocs=2)
