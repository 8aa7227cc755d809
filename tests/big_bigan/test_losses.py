"""Losses and penalty against sums from the paper, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from paper_layers.big_bigan import (
    BigBiGANDiscriminator,
    Scores,
    discriminator_loss,
    encoder_generator_loss,
    r1_penalty,
)

TERMS = [("x",), ("xz",), ("x", "xz"), ("z", "xz"), ("x", "z", "xz")]


def scores(terms: tuple[str, ...], n: int, dtype: torch.dtype = torch.double) -> Scores:
    return Scores(**{name: (2 * torch.randn(n, dtype=dtype)).requires_grad_() for name in terms})


@pytest.mark.parametrize("weights", [None, {"xz": 0.5}, {"x": 2, "z": 0.0}])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("terms", TERMS)
def test_formulas(terms: tuple[str, ...], reduction: str, weights: dict[str, float] | None) -> None:
    """Values, and the gradients of all scores, which the hinge cuts off."""
    real, fake = scores(terms, 7), scores(terms, 5)
    weights = weights and {name: w for name, w in weights.items() if name in terms}
    share = 1 / len(terms) if reduction == "mean" else 1
    hinge = linear = 0.0
    for name in terms:
        factor = share * (weights or {}).get(name, 1)
        r, f = (getattr(part, name).detach() for part in (real, fake))
        hinge += factor * (sum(max(0.0, 1 - s) for s in r.tolist()) / 7 + sum(max(0.0, 1 + s) for s in f.tolist()) / 5)
        linear += factor * (sum(r.tolist()) / 7 - sum(f.tolist()) / 5)
    loss, other = (
        of(real, fake, reduction=reduction, weights=weights) for of in (discriminator_loss, encoder_generator_loss)
    )
    assert loss.item() == pytest.approx(hinge, rel=1e-12)
    assert other.item() == pytest.approx(linear, rel=1e-12)
    for name in terms:
        factor = share * (weights or {}).get(name, 1)
        r, f = getattr(real, name), getattr(fake, name)
        for of, signs in ((loss, (-(r < 1).double(), (f > -1).double())), (other, (1.0, -1.0))):
            slopes = torch.autograd.grad(of, (r, f), retain_graph=True)
            for slope, sign in zip(slopes, signs, strict=True):
                torch.testing.assert_close(slope, torch.zeros_like(slope) + sign * factor / len(slope))


@pytest.mark.parametrize("loss", [discriminator_loss, encoder_generator_loss])
def test_compile_and_dtype(loss: Any) -> None:
    real, fake = (scores(("x", "z", "xz"), 4, torch.float) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        value = torch.compile(loss, backend="aot_eager", fullgraph=True)(
            real, fake, reduction="mean", weights={"x": 3.0}
        )
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(real, fake, reduction="mean", weights={"x": 3.0}))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((("x",), ("x",), {"reduction": "max"}), ValueError, "reduction: expected one of sum, mean, got 'max'"),
        ((("x", "xz"), ("x",), {}), ValueError, r"fake: expected scores of \['x', 'xz'\].* got \['x'\]"),
        (((), (), {}), ValueError, "fake: expected scores of some term"),
        ((("x",), ("x",), {"weights": {"z": 1}}), ValueError, r"weights: expected some of \['x'\], got 'z'"),
        ((("x",), ("x",), {"weights": {"x": "1"}}), TypeError, r"weights\['x'\]: "),
    ],
)
@pytest.mark.parametrize("loss", [discriminator_loss, encoder_generator_loss])
def test_bad_input(loss: Any, arguments: Any, error: type[Exception], message: str) -> None:
    real, fake, options = arguments
    with pytest.raises(error, match=message):
        loss(scores(real, 3), scores(fake, 3), **options)


def test_no_pairs() -> None:
    for sizes in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="at least one pair"):
            discriminator_loss(*(scores(("x",), n) for n in sizes))


# --- R1


def small(**options: Any) -> BigBiGANDiscriminator:
    trunk = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Softplus())
    return BigBiGANDiscriminator(trunk, 3, 2, hidden_features=4, depth=2, **options).double().eval()


def test_r1() -> None:
    """Compare with the mean squared gradient of s_x + s_xz, one image at a time; s_z has no gradient."""
    net, images, latents = small(), torch.randn(3, 1, 3, 4, dtype=torch.double), torch.randn(3, 2, dtype=torch.double)

    def slope(image: Tensor, latent: Tensor) -> Tensor:
        def score(image: Tensor) -> Tensor:
            found = net(image[None], latent[None])
            return (found.x + found.xz).squeeze()

        return torch.autograd.functional.jacobian(score, image)

    expected = sum(slope(*pair).square().sum() for pair in zip(images, latents, strict=True)) / 3
    images.requires_grad_()
    torch.testing.assert_close(r1_penalty(net(images, latents), images), expected)


@pytest.mark.parametrize("activation", ["pre", "post"])
def test_r1_has_the_right_gradient(activation: str) -> None:
    """Compare the second derivative, through the trunk and J, with finite differences of the penalty."""
    net = small(activation=activation)
    images = torch.randn(3, 1, 3, 4, dtype=torch.double, requires_grad=True)
    latents = torch.randn(3, 2, dtype=torch.double)
    names, values = zip(*net.named_parameters(), strict=True)

    def penalty(*values: Tensor) -> Tensor:
        return r1_penalty(functional_call(net, dict(zip(names, values, strict=True)), (images, latents)), images)

    assert torch.autograd.gradcheck(penalty, values, fast_mode=True, rtol=1e-4)
    penalty(*values).backward()
    for part in (net.trunk, net.heads.x, net.heads.xz.mlp, net.heads.xz.score):
        assert any(p.grad is not None and p.grad.abs().max() > 1e-6 for p in part.parameters())


def test_r1_bad_input() -> None:
    net, images, latents = small(), torch.randn(2, 1, 3, 4, dtype=torch.double), torch.randn(2, 2, dtype=torch.double)
    with pytest.raises(ValueError, match="images: expected requires_grad=True, got False"):
        r1_penalty(net(images, latents), images)
    found = net(images, latents)
    with pytest.raises(ValueError, match="scores: expected scores that depend on images"):
        r1_penalty(found, images.requires_grad_())
    with pytest.raises(ValueError, match="scores: expected scores that depend on images"):
        r1_penalty(Scores(z=found.z), images)
