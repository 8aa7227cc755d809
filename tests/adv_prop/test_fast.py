"""Fast AdvProp's step against its three losses, one by one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paper_layers import swap
from paper_layers.adv_prop import fast_adv_prop_backward
from tests.adv_prop.test_loss import batch, plain

N, ATTACKED = 10, 4


def model_and_batch(**factory: Any) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    return swap.split_batch_norm(plain(**factory), split_sizes=(0.6, 0.4)), *batch(N, **factory)


def test_gradients_are_those_of_three_forwards() -> None:
    """One plain network per split; means over the images of each kind, as in the authors' code."""
    model, x, y = model_and_batch(dtype=torch.float64)
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # The step adds to existing gradients.
    main, auxiliary = (swap.plain_batch_norm(copy.deepcopy(model), split) for split in (0, 1))
    for p in (*main.parameters(), *auxiliary.parameters()):
        p.grad = None
    clean, attacked = N - ATTACKED, ATTACKED
    options: dict[str, Any] = {"radius": 8, "step_size": 6, "bounds": (0, 1)}
    loss = fast_adv_prop_backward(model, x, y, **options, generator=torch.Generator().manual_seed(1))

    generator = torch.Generator().manual_seed(1)
    torch.rand(attacked, generator=generator)
    noise = torch.empty(attacked, 3, 7, 7, dtype=torch.float64).uniform_(-1, 1, generator=generator)
    noisy = (x[clean:] + 8 / 255 * noise).clamp(0, 1).requires_grad_()
    losses = [F.cross_entropy(main(x[:clean]), y[:clean], reduction="sum")]
    losses[0].backward()
    losses.append(0.5 * F.cross_entropy(auxiliary(noisy), y[clean:], reduction="sum"))
    losses[1].backward()
    assert noisy.grad is not None
    adversarial = (noisy.detach() + 6 / 255 * noisy.grad.sign()).clamp(x[clean:] - 8 / 255, x[clean:] + 8 / 255)
    losses.append(0.5 * F.cross_entropy(auxiliary(adversarial.clamp(0, 1)), y[clean:], reduction="sum"))
    losses[2].backward()

    torch.testing.assert_close(loss, sum(losses).detach() / N)  # type: ignore[union-attr]
    for i in (0, 3, 7):
        for name, p in model[i].named_parameters():
            both = (main[i].get_parameter(name).grad + auxiliary[i].get_parameter(name).grad) / N
            torch.testing.assert_close(p.grad, 1 + both)
    for i in (1, 4):
        for split, (alone, count) in enumerate(((main, clean), (auxiliary, attacked))):
            torch.testing.assert_close(model[i].split_norms[split].weight.grad, 1 + alone[i].weight.grad / count)
            torch.testing.assert_close(model[i].split_norms[split].bias.grad, 1 + alone[i].bias.grad / count)
            torch.testing.assert_close(model[i].split_norms[split].running_mean, alone[i].running_mean)
            assert model[i].split_norms[split].num_batches_tracked == alone[i].num_batches_tracked == 1 + split
    assert not any(p._backward_hooks for p in model.parameters())
    assert model[1]._split is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_model(reentrant: bool) -> None:
    model, x, y = model_and_batch(dtype=torch.float64)
    twin = copy.deepcopy(model)

    class Checkpointed(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            first, *others = self  # Torch's reentrant form needs an input with a gradient.
            return checkpoint(nn.Sequential(*others), first(input), use_reentrant=reentrant)

    model.__class__ = Checkpointed
    for one in (model, twin):
        fast_adv_prop_backward(one, x, y, bounds=(0, 1), generator=torch.Generator().manual_seed(1))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_mixed_precision_with_a_scaler() -> None:
    model, x, y = model_and_batch()
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator()
    with torch.autocast("cpu", torch.float16):
        loss = fast_adv_prop_backward(
            model,
            x,
            y,
            bounds=(0, 1),
            backward=lambda loss: scaler.scale(loss).backward(),
            generator=generator.manual_seed(1),
        )
    scaler.unscale_(optimizer)
    expected = fast_adv_prop_backward(twin, x, y, bounds=(0, 1), generator=generator.manual_seed(1))
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.9 or q.grad.abs().max() < 1e-6


def test_frozen_parameters() -> None:
    model, x, y = model_and_batch()
    model[1].requires_grad_(False)
    model[4].eval()
    fast_adv_prop_backward(model, x, y, bounds=(0, 1))
    assert model[1].weight.grad is None
    assert model[4].num_batches_tracked == 0


@pytest.mark.parametrize("images", [1, 2])
def test_last_batch_that_is_too_small_for_the_split(images: int) -> None:
    model = swap.split_batch_norm(plain(dtype=torch.float64), split_sizes=(0.8, 0.2))
    main, (x, y) = swap.plain_batch_norm(copy.deepcopy(model)), batch(images, dtype=torch.float64)
    auxiliary = copy.deepcopy(model[1].aux_bn.state_dict())
    loss = fast_adv_prop_backward(model, x, y, bounds=(0, 1))
    expected = F.cross_entropy(main(x), y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, p in main.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, p.grad)
    torch.testing.assert_close(model[1].aux_bn.state_dict(), auxiliary)


def test_batch_without_clean_images() -> None:
    model, (x, y) = swap.split_batch_norm(plain(), split_sizes=(0.2, 0.8)), batch(2)
    assert model[1].sizes(2) == [0, 2]
    assert fast_adv_prop_backward(model, x, y, bounds=(0, 1)).isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bad_input() -> None:
    _, x, y = model_and_batch()
    with pytest.raises(ValueError, match="model: expected split batch norms"):
        fast_adv_prop_backward(plain(), x, y, bounds=(0, 1))
    for model in (swap.split_batch_norm(plain(), 3, split_sizes=(6, 2, 2)), swap.split_batch_norm(plain())):
        model[1].split_sizes = (0.8, 0.2) if model[1].num_splits == 2 else (6, 2, 2)
        with pytest.raises(ValueError, match="expected norms that split a batch in the same two,"):
            fast_adv_prop_backward(model, x, y, bounds=(0, 1))
    with pytest.raises(ValueError, match="bounds, mean, std"):
        fast_adv_prop_backward(model_and_batch()[0], x, y)
