"""The loss in pytorch-metric-learning's own trainer and tester."""

from __future__ import annotations

import pytest
import torch
from pytorch_metric_learning.losses import MultipleLosses, NTXentLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn
from torch.utils.data import TensorDataset

from paper_layers.soft_triple import SoftTripleLoss, param_groups, recall_at_k


def data(seed: int) -> TensorDataset:
    """Four classes of two modes each in six numbers, and ten that tell nothing."""
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
    with pytest.raises(ValueError, match="indices_tuple: expected None, since SoftTriple needs no miner, got tuple"):
        MultipleLosses([ours], [MultiSimilarityMiner()])(x, labels)
