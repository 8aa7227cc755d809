"""The loss of AdvProp, and the attack through split norms."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
import torchvision
# isort: on

from paper_layers import swap
from paper_layers.adv_prop import adv_prop_loss, fast_adv_prop_backward, pgd, use_split


def plain(**factory: Any) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, **factory), nn.BatchNorm2d(4, **factory), nn.ReLU()]
    layers += [nn.Conv2d(4, 8, 3, stride=2, **factory), nn.BatchNorm2d(8, **factory), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5, **factory))


def apart(model: nn.Sequential, scale: float = 3.0) -> nn.Sequential:
    """Make the two splits' outputs differ."""
    for module in (model[1], model[4]):
        module.aux_bn[0].weight.data.mul_(-scale)
        module.aux_bn[0].running_mean.add_(0.5)
    return model


def batch(n: int = 8, **factory: Any) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, 7, 7, **factory), torch.arange(n) % 5


attack = functools.partial(pgd, radius=8, step_size=4, steps=2, bounds=(0, 1), random_start=0, targeted=False)


def test_attack_runs_through_the_last_split_with_running_statistics() -> None:
    model, (x, y) = apart(swap.split_batch_norm(plain())), batch()
    state = copy.deepcopy(model.state_dict())
    found = attack(model, x, y)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model.training
    for split, same in ((1, True), (0, False)):
        alone = swap.plain_batch_norm(copy.deepcopy(model), split).eval()
        assert torch.equal(attack(alone, x, y), found) is same
        assert torch.equal(attack(model, x, y, split=split), attack(alone, x, y))
    with use_split(model, 0):  # The attack's own split wins.
        assert torch.equal(attack(model, x, y), found)
        assert model[1]._split == 0
    three = swap.split_batch_norm(plain(), 3)
    with use_split(three.eval(), 2):
        expected = attack(swap.plain_batch_norm(copy.deepcopy(three), 2), x, y)
    assert torch.equal(attack(three, x, y), expected)
    with pytest.raises(ValueError, match="split: expected at most 1"):
        attack(model, x, y, split=2)
    with pytest.raises(ValueError, match="expected at least one split batch norm"):
        attack(plain(), x, y, split=1)


def test_attack_of_a_frozen_or_compiled_model() -> None:
    model, (x, y) = apart(swap.split_batch_norm(plain())), batch()
    expected = attack(model, x, y)
    model[1].eval()
    assert torch.equal(attack(torch.compile(model, backend="eager"), x, y), expected)
    assert [m.training for m in model] == [True, False, *[True] * 6]


def test_loss_and_gradients_are_those_of_two_forwards() -> None:
    """Two plain networks with equal weights outside the norms: one gets clean images, one adversarial images."""
    model = apart(swap.split_batch_norm(plain(dtype=torch.float64)))
    x, y = batch(dtype=torch.float64)
    main, auxiliary = (swap.plain_batch_norm(copy.deepcopy(model), split) for split in (0, 1))
    adversarial = attack(model, x, y)
    loss = adv_prop_loss(model, x, y, attack)
    expected = F.cross_entropy(main(x), y) + F.cross_entropy(auxiliary(adversarial), y)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for split, plain_model in ((0, main), (1, auxiliary)):
        for norm, other in ((model[1], plain_model[1]), (model[4], plain_model[4])):
            torch.testing.assert_close(norm.split_norms[split].weight.grad, other.weight.grad)
            torch.testing.assert_close(norm.split_norms[split].running_var, other.running_var)
            assert norm.split_norms[split].num_batches_tracked == 1
    for i in (0, 3, 7):
        torch.testing.assert_close(model[i].weight.grad, main[i].weight.grad + auxiliary[i].weight.grad)


def test_criterion() -> None:
    model, (x, y) = swap.split_batch_norm(plain()), batch()
    smooth = functools.partial(F.cross_entropy, label_smoothing=0.1)
    twin = copy.deepcopy(model)
    clean, adversarial = twin(torch.cat([x, attack(model, x, y)])).chunk(2)
    expected = smooth(clean, y) + smooth(adversarial, y)
    torch.testing.assert_close(adv_prop_loss(model, x, y, attack, criterion=smooth), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    model, (x, y) = swap.split_batch_norm(plain()), batch()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    with torch.autocast("cpu", dtype):
        loss = adv_prop_loss(model, x, y, attack)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    expected = adv_prop_loss(twin, x, y, attack)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.9 or q.grad.abs().max() < 1e-6
    before = copy.deepcopy(model.state_dict())
    scaler.step(optimizer)
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_it_learns_both() -> None:
    model = swap.split_batch_norm(plain())
    x, y = batch(40)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        loss = adv_prop_loss(model, x, y, attack)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1
    model.eval()
    with use_split(model, 1):
        assert (model(attack(model, x, y)).argmax(1) == y).float().mean() > 0.8
    assert (swap.plain_batch_norm(model)(x).argmax(1) == y).float().mean() > 0.8


def test_bad_input() -> None:
    x, y = batch()
    with pytest.raises(ValueError, match=r"model: expected split batch norms, as swap\.split_batch_norm makes them"):
        adv_prop_loss(plain(), x, y, attack)
    with pytest.raises(ValueError, match="model: expected training mode"):
        adv_prop_loss(swap.split_batch_norm(plain()).eval(), x, y, attack)
    with pytest.raises(ValueError, match=r"split 16 images in halves, got one for \[12, 4\]"):
        adv_prop_loss(swap.split_batch_norm(plain(), split_sizes=(0.75, 0.25)), x, y, attack)
    model = swap.split_batch_norm(plain())
    for wrong in (x[:4], x.double()):
        with pytest.raises(ValueError, match=r"attack: expected images like the clean ones, torch\.float32 of shape"):
            adv_prop_loss(model, x, y, lambda *_, images=wrong: images)
    with pytest.raises(ValueError, match=r"num_splits=3"):
        adv_prop_loss(swap.split_batch_norm(plain(), 3), x, y, attack)
    frozen = swap.split_batch_norm(plain())
    frozen[1].eval()  # One norm may be frozen.
    adv_prop_loss(frozen, x, y, attack).backward()


class Auxiliary(nn.Module):
    """Return in training the named tuple of torchvision's GoogLeNet or Inception v3."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind, self.norm, self.fc = kind, nn.BatchNorm2d(3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Any:
        logits = self.fc(self.norm(x).mean((2, 3)))
        others = [logits * (i + 2) for i in range(len(self.kind._fields) - 1)]
        return self.kind(logits, *others) if self.training else logits


@pytest.mark.parametrize(
    ("kind", "weight"),
    [(torchvision.models.GoogLeNetOutputs, 0.3), (torchvision.models.InceptionOutputs, 0.4)],
)
def test_auxiliary_logits(kind: Any, weight: float) -> None:
    """The loss contains each output of both halves, the auxiliary ones with the papers' weights."""
    model = swap.split_batch_norm(Auxiliary(kind)).double()
    x, y = torch.rand(3, 3, 4, 4).double(), torch.tensor([0, 1, 4])
    attack = functools.partial(pgd, steps=1, bounds=(0, 1), random_start=0, targeted=False)
    adversarial, twin = attack(model, x, y), copy.deepcopy(model)
    loss = adv_prop_loss(model, x, y, attack)
    expected = torch.zeros(())
    for output in twin(torch.cat([x, adversarial])):
        share = 1 if expected == 0 else weight
        expected = expected + share * sum(F.cross_entropy(half, y) for half in output.split(3))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())

    fast = swap.split_batch_norm(Auxiliary(kind), split_sizes=(0.5, 0.5))
    fast_adv_prop_backward(fast, torch.rand(5, 3, 4, 4), torch.arange(5), bounds=(0, 1))
    assert all(p.grad is not None for p in fast.parameters())


def test_other_outputs_go_to_the_criterion_in_halves() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Any:
            x = self.norm(x).mean((2, 3))
            return {"logits": x} if self.training else x

    model, x, y = swap.split_batch_norm(Named()), torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 2])
    loss = adv_prop_loss(
        model,
        x,
        y,
        lambda model, x, y: x.clone(),
        criterion=lambda output, y: F.cross_entropy(output["logits"], y),
    )
    torch.testing.assert_close(loss, 2 * F.cross_entropy(copy.deepcopy(model)(torch.cat([x, x]))["logits"][:3], y))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_odd_last_batch(size: int) -> None:
    model = swap.split_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)))
    x, y = torch.rand(size, 3, 8, 8), torch.arange(size) % 5
    loss = adv_prop_loss(model, x, y, functools.partial(pgd, steps=1, bounds=(0, 1)))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.uint16])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    x, y = batch()
    for step in (
        lambda model, y: adv_prop_loss(model, x, y, attack),
        lambda model, y: fast_adv_prop_backward(model, x, y, bounds=(0, 1), generator=torch.Generator().manual_seed(1)),
    ):
        torch.manual_seed(1)
        model = swap.split_batch_norm(plain())
        assert torch.equal(step(copy.deepcopy(model), y.to(dtype)), step(model, y))
