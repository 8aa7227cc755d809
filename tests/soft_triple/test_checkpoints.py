"""Centers of the official code and of pytorch-metric-learning, and their losses there and here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytorch_metric_learning.losses import SoftTripleLoss as TheirLoss
from pytorch_metric_learning.regularizers import SparseCentersRegularizer
from torch import Tensor

from paper_layers.soft_triple import SoftTripleLoss, load_official
from testing.official import soft_triple as official

CLASSES, K, DIM = 5, 3, 4
NETWORK = {"backbone.fc.weight": torch.ones(2, 2), "backbone.fc.bias": torch.ones(2), "weight_decay.x": torch.ones(1)}


def fc(dim: int = DIM) -> Tensor:
    return torch.randn(dim, CLASSES * K, generator=torch.Generator().manual_seed(0))


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(9, DIM, generator=generator).to(dtype), torch.randint(CLASSES, (9,), generator=generator)


def check(loss: SoftTripleLoss, columns: Tensor) -> None:
    for c in range(CLASSES):
        for k in range(K):
            assert torch.equal(loss.centers[c, k], columns[:, c * K + k])


@pytest.mark.parametrize("dim", [DIM, CLASSES * K])  # a square does not show its layout
def test_layouts_and_places(dim: int, tmp_path: Path) -> None:
    columns = fc(dim)
    rows = columns.mT.contiguous()
    torch.save({"epoch": 3, "state_dict": {**NETWORK, "criterion.fc": columns}}, tmp_path / "model.pth")
    for state in (
        {"fc": columns},
        {"weight": rows},
        {"module.fc": columns},
        {"module.weight": rows},
        {**NETWORK, "metric_loss.fc": columns},
        {**NETWORK, "losses.0.weight": rows},
        {**NETWORK, "criterion.loss.weight": rows},
        {"model": {**NETWORK, "loss.fc": columns}},
        tmp_path / "model.pth",
    ):
        check(load_official(SoftTripleLoss(CLASSES, dim, K), state), columns)


def test_nothing_is_loaded_unless_it_fits() -> None:
    loss = SoftTripleLoss(CLASSES, DIM, K)
    before = loss.centers.clone()
    for state, message in (
        ({}, "missing centers"),
        (NETWORK, "missing centers"),
        ({"fc": fc().mT}, r"fc of shape \(15, 4\) where centers has \(5, 3, 4\)"),
        ({"weight": fc()}, r"weight of shape \(4, 15\)"),
        ({"fc": fc()[0]}, r"fc of shape \(15,\)"),
        ({"one.fc": fc(), "two.fc": fc()}, "unexpected two.fc"),
    ):
        with pytest.raises(ValueError, match=message):
            load_official(loss, state)
    with pytest.raises(TypeError, match="state_dict: expected a mapping or a path, got int"):
        load_official(loss, 3)
    assert torch.equal(loss.centers, before)


@pytest.mark.parametrize("tau", [0, 0.2, 3])
def test_official_loss(tau: float) -> None:
    x, labels = batch(torch.float64)
    columns = fc().double().requires_grad_()
    options = {"la": 15.0, "gamma": 0.2, "margin": 0.05}
    ours = load_official(SoftTripleLoss(CLASSES, DIM, K, tau=tau, dtype=torch.float64, **options), {"fc": columns})
    expected = official.soft_triple_loss(x, columns, labels, CLASSES, tau=tau, **options)
    found = ours(x, labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(expected, columns)
    found.backward()
    torch.testing.assert_close(ours.centers.grad.flatten(0, 1).mT, grad, rtol=0, atol=1e-12)


def their_loss(tau: float) -> TheirLoss:
    """Make pytorch-metric-learning's loss, whose separate regulariser has the paper's tau as weight."""
    if tau == 0:
        return TheirLoss(CLASSES, DIM, K)
    return TheirLoss(CLASSES, DIM, K, weight_regularizer=SparseCentersRegularizer(CLASSES, K), weight_reg_weight=tau)


@pytest.mark.parametrize("tau", [0, 0.2, 3])
def test_pytorch_metric_learning(tau: float) -> None:
    theirs = their_loss(tau)
    ours = load_official(SoftTripleLoss(CLASSES, DIM, K, tau=tau), theirs.state_dict())
    x, labels = batch()
    # Their regulariser lacks sqrt(D^2 + 1e-5) - D for each distance.
    distance = torch.cdist(
        torch.nn.functional.normalize(ours.centers, dim=2).double(),
        torch.nn.functional.normalize(ours.centers, dim=2).double(),
    )
    lacking = ((distance.square() + 1e-5).sqrt() - distance).triu(1).sum() / (CLASSES * K * (K - 1))
    difference = ours(x, labels) - theirs(x, labels)
    torch.testing.assert_close(difference.double(), tau * lacking, rtol=0, atol=1e-5)
    assert 0 <= lacking < 1 / 600
    torch.testing.assert_close(ours.get_logits(x) / ours.la, theirs.get_logits(x))


def test_coincident_centers() -> None:
    """The difference is at its maximum, and the gradient is finite."""
    columns = fc()[:, ::K].repeat_interleave(K, 1)
    theirs, ours = their_loss(0.2), load_official(SoftTripleLoss(CLASSES, DIM, K), {"fc": columns})
    theirs.load_state_dict({"fc": columns})
    x, labels = batch()
    found, other = ours(x, labels), theirs(x, labels)
    assert (found - other).item() == pytest.approx(0.2 * 0.5 * 1e-5**0.5, abs=1e-4)
    found.backward()
    assert ours.centers.grad.isfinite().all()
