"""Gradients, signs, calls and errors of each step, and a game with a known solution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paper_layers.big_bigan import (
    BigBiGANDiscriminator,
    Latent,
    LatentHead,
    Scores,
    StepResult,
    discriminator_step,
    encoder_generator_step,
    r1_penalty,
)

STEPS: list[Any] = [discriminator_step, encoder_generator_step]
PIXELS, LATENT = 6, 3


def players(**options: Any) -> tuple[BigBiGANDiscriminator, LatentHead, nn.Module]:
    """Make small players on rows of pixels, in float64."""
    options = {"hidden_features": 8, "depth": 2, **options}
    discriminator = BigBiGANDiscriminator(nn.Sequential(nn.Linear(PIXELS, 5), nn.Tanh()), 5, LATENT, **options)
    return (
        discriminator.double(),
        LatentHead(PIXELS, LATENT, hidden_features=8, depth=2).double(),
        nn.Linear(LATENT, PIXELS).double(),
    )


def batch(real: int = 7, fake: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(real, PIXELS, dtype=torch.double), torch.randn(fake, LATENT, dtype=torch.double)


def mean_encoder(encoder: LatentHead) -> Any:
    return lambda images: encoder(images).mean


def grads(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


# --- what a step computes


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_steps_are_the_formulas(reduction: str) -> None:
    """Losses and all gradients equal the paper's sums, with separate forwards of real and fake pairs."""
    d, e, g = players()
    d.eval()  # In training mode the second forward would have other weights.
    images, latents = batch(real=5)
    share = 1 / 3 if reduction == "mean" else 1
    real, fake = d(images, e(images).mean), d(g(latents), latents)
    hinge = share * sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True))
    linear = share * sum(r.mean() - f.mean() for r, f in zip(real, fake, strict=True))
    expected_d = torch.autograd.grad(hinge, [*d.parameters()], retain_graph=True)
    expected_players = torch.autograd.grad(linear, [*e.parameters(), *g.parameters()])

    step = discriminator_step(d, mean_encoder(e), g, images, latents, reduction=reduction)
    step.loss.backward()
    torch.testing.assert_close(step, StepResult(hinge, real, fake))
    torch.testing.assert_close(grads(d), list(expected_d))
    assert all(grad is None for grad in grads(e) + grads(g))

    d.zero_grad()
    step = encoder_generator_step(d, mean_encoder(e), g, images, latents, reduction=reduction)
    step.loss.backward()
    torch.testing.assert_close(step, StepResult(linear, real, fake))
    torch.testing.assert_close([*grads(e), *grads(g)], list(expected_players))
    assert all(grad is None for grad in grads(d))


def test_each_learns_from_the_scores_it_touches() -> None:
    """s_x gives the encoder no gradient, s_z none to the generator; real pairs reach only E, fake pairs only G."""
    d, e, g = players()
    step = encoder_generator_step(d, e, g, *batch())
    reached = {}
    for kind, scores in (("real", step.real), ("fake", step.fake)):
        for name, score in scores.terms.items():
            for player, module in (("E", e), ("G", g)):
                found = [None] * len([*module.parameters()])
                if score.requires_grad:
                    found = torch.autograd.grad(score.sum(), module.parameters(), retain_graph=True, allow_unused=True)
                reached[kind, name, player] = any(grad is not None and bool(grad.any()) for grad in found)
    wanted = {("real", "z", "E"), ("real", "xz", "E"), ("fake", "x", "G"), ("fake", "xz", "G")}
    assert {key for key, value in reached.items() if value} == wanted


@pytest.mark.parametrize(
    ("step", "who", "signs"), [(STEPS[0], "D", (1, -1)), (STEPS[1], "E", (-1, 0)), (STEPS[1], "G", (0, 1))]
)
def test_signs(step: Any, who: str, signs: tuple[int, int]) -> None:
    """A small step of D raises real scores and lowers fake ones; E lowers real scores, G raises fake ones."""
    d, e, g = players()
    d.eval()
    images, latents = batch(50, 50)
    learner: nn.Module = {"D": d, "E": e, "G": g}[who]
    before = step(d, mean_encoder(e), g, images, latents)
    before.loss.backward()
    torch.optim.SGD(learner.parameters(), 1e-3).step()
    with torch.no_grad():
        after = step(d, mean_encoder(e), g, images, latents)
    moved = [
        sum((new - old).mean().item() for old, new in zip(*part, strict=True))
        for part in ((before.real, after.real), (before.fake, after.fake))
    ]
    for change, sign in zip(moved, signs, strict=True):
        assert change * sign > 1e-5 if sign else change == 0


def test_terms_weights_and_r1() -> None:
    d, e, g = players(terms=("x", "xz"))
    d.eval()
    images, latents = batch()
    plain, weighted = (
        discriminator_step(d, mean_encoder(e), g, images, latents, weights=weights) for weights in (None, {"x": 3})
    )
    assert set(plain.real.terms) == {"x", "xz"}
    x = F.relu(1 - plain.real.x).mean() + F.relu(1 + plain.fake.x).mean()
    torch.testing.assert_close(weighted.loss, plain.loss + 2 * x)
    punished = discriminator_step(d, mean_encoder(e), g, images, latents, r1_gamma=8.0)
    inputs = images.clone().requires_grad_()
    penalty = r1_penalty(d(inputs, e(images).mean), inputs)
    torch.testing.assert_close(punished.loss, plain.loss + 4 * penalty)
    expected = torch.autograd.grad(plain.loss + 4 * penalty, [*d.parameters()])
    punished.loss.backward()
    torch.testing.assert_close(grads(d), list(expected))
    assert not images.requires_grad


@pytest.mark.parametrize("step", STEPS)
def test_labels_and_images_of_the_encoder(step: Any) -> None:
    d, e, g = players(num_classes=4)
    d.eval()
    (images, latents), (other, _) = batch(5), batch(5)
    labels = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([3, 2, 1, 0, 3, 2, 1])
    found = step(d, mean_encoder(e), g, images, latents, labels=labels, encoder_images=other)
    torch.testing.assert_close(found.real, d(images, e(other).mean, labels[0]))
    torch.testing.assert_close(found.fake, d(g(latents), latents, labels[1]))


def test_latents_of_images_are_samples() -> None:
    d, e, g = players()
    d.eval()
    images, latents = batch()
    for step in STEPS:
        torch.manual_seed(5)
        found = step(d, e, g, images, latents)
        torch.manual_seed(5)
        torch.testing.assert_close(found.real, d(images, e(images).sample()))


# --- one forward


@pytest.mark.parametrize("step", STEPS)
def test_one_forward_and_one_power_iteration(step: Any) -> None:
    d, e, g = players()
    calls = []
    d.register_forward_hook(lambda *_: calls.append(1))
    parts: list[Any] = [m.parametrizations.weight for m in d.heads.modules() if isinstance(m, nn.Linear)]
    expected = []
    for part in parts:
        u = F.normalize(part.original @ part[0]._v, dim=0)
        expected += [u, F.normalize(part.original.T @ u, dim=0)]
    step(d, e, g, *batch()).loss.backward()
    assert len(calls) == 1
    torch.testing.assert_close([v.clone() for part in parts for v in (part[0]._u, part[0]._v)], expected)


# --- side effects


def test_frozen_parameters_are_given_back() -> None:
    d, e, g = players()
    d.trunk.requires_grad_(False)
    wanted = [p.requires_grad for p in d.parameters()]
    encoder_generator_step(d, e, g, *batch())
    assert [p.requires_grad for p in d.parameters()] == wanted
    images, latents = batch()
    with pytest.raises(ValueError, match="finite"):
        encoder_generator_step(d, e, g, images / 0, latents)
    assert [p.requires_grad for p in d.parameters()] == wanted


# --- autocast, compile


@pytest.mark.parametrize("step", STEPS)
def test_autocast(step: Any) -> None:
    """Under bfloat16 autocast, losses and gradients are float32 and close to those without autocast."""
    d, e, g = (module.float() for module in players())
    d.eval()
    images, latents = (x.float() for x in batch(32, 32))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = step(d, mean_encoder(e), g, images, latents)
        assert result.loss.dtype == torch.float32
        assert all(score.dtype == torch.float32 for part in result[1:] for score in part)
        parameters = [p for module in ((d,) if step is STEPS[0] else (e, g)) for p in module.parameters()]
        slopes = torch.autograd.grad(result.loss, parameters)
        assert all(slope.dtype == torch.float32 for slope in slopes)
        found.append((result.loss, torch.cat([slope.flatten() for slope in slopes])))
    (loss, slope), (half_loss, half_slope) = found
    torch.testing.assert_close(half_loss, loss, rtol=0.02, atol=0.02)
    assert (half_slope - slope).norm() < 0.05 * slope.norm()
    assert not torch.equal(half_slope, slope)


def test_compiled_discriminator() -> None:
    d, e, g = players(depth=0, hidden_features=1)
    compiled = torch.compile(d.eval(), backend="aot_eager", fullgraph=True)
    images, latents = batch()
    for step in STEPS:
        one, other = (step(x, mean_encoder(e), g, images, latents) for x in (d, compiled))
        torch.testing.assert_close(other, one)
        other.loss.backward()
        assert any(grad is not None for grad in grads(d)) == (step is discriminator_step)
        d.zero_grad()


# --- errors


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in ("real", "fake") for n in ("x", "z", "xz")])
def test_scores_that_are_not_finite_are_named(step: Any, kind: str, name: str) -> None:
    _, e, g = players()

    def broken(images: Tensor, latents: Tensor) -> Scores:
        scores = {term: images.sum(1) + latents.sum(1) for term in ("x", "z", "xz")}
        row = 2 if kind == "real" else 8
        scores[name] = torch.where(torch.arange(len(images)) == row, float("nan"), scores[name])
        return Scores(**scores)

    with pytest.raises(ValueError, match=f"^s_{name} of {kind} pairs: expected finite scores, got 1 of 7 that are not"):
        step(broken, e, g, *batch())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"generator": lambda z: z}, ValueError, r"generator\(latents\): expected shape \(N, 6\), got \(7, 3\)"),
        ({"encoder": lambda x: x}, ValueError, r"encoder\(images\): expected shape \(N, 3\), got \(7, 6\)"),
        ({"encoder": lambda x: x[1:, :3]}, ValueError, r"latents: expected shape \(14, 3\).* got \(13, 3\)"),
        (
            {"latents": torch.ones(4, 2).double()},
            RuntimeError,
            "shapes cannot be multiplied",
        ),  # The generator's own error.
        ({"labels": (torch.zeros(7).long(),) * 2}, ValueError, "labels: expected None without num_classes"),
        ({"labels": torch.zeros(14).long()}, TypeError, "labels: expected a pair, .* got Tensor"),
        ({"reduction": "none"}, ValueError, "reduction: .* 'none'"),
        ({"weights": {"y": 1.0}}, ValueError, "weights: .* 'y'"),
    ],
)
@pytest.mark.parametrize("step", STEPS)
def test_bad_input(step: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    d, e, g = players()
    images, latents = batch()
    arguments: dict[str, Any] = {"discriminator": d, "encoder": e, "generator": g, "images": images, "latents": latents}
    with pytest.raises(error, match=message):
        step(**{**arguments, **change})


# --- the game


class Projection(nn.Module):
    """A generator with internal noise: x = a z + s n."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((2,), 0.1))

    def forward(self, z: Tensor) -> Tensor:
        return z * self.a + NOISE * torch.randn(len(z), 2)


NOISE = 0.6
TRUTH = torch.tensor([0.8, -0.5])


def test_linear_gaussian_game() -> None:
    """E learns the posterior (mean and deviation) of x = a z + 0.6 n, and G learns a, both up to a common sign.

    With the covariance C of x, mean and variance are a C^-1 x and 1 - a C^-1 a if E's pairs are distributed as G's.
    """
    d = BigBiGANDiscriminator(nn.Identity(), 2, 1, hidden_features=16, depth=2)
    e, g = LatentHead(2, 1, depth=0), Projection()
    learned = [*e.parameters(), *g.parameters()]
    average = [torch.zeros_like(p) for p in learned]
    optimizers = [torch.optim.Adam(p, 0.02, (0.0, 0.9), fused=True) for p in (d.parameters(), learned)]
    steps, burnt = 300, 120
    for done in range(steps):
        for step, optimizer in zip(STEPS, optimizers, strict=True):
            x = torch.randn(256, 1) * TRUTH + NOISE * torch.randn(256, 2)
            loss = step(d, e, g, x, torch.randn(256, 1)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if done >= burnt:
            for mean, p in zip(average, learned, strict=True):
                mean += p.detach() / (steps - burnt)
    weight, bias, a = average
    posterior = torch.linalg.solve(torch.outer(TRUTH, TRUTH) + NOISE**2 * torch.eye(2), TRUTH)
    sign = a[0].sign()
    torch.testing.assert_close(sign * a, TRUTH, rtol=0, atol=0.06)
    torch.testing.assert_close(sign * weight[0], posterior, rtol=0, atol=0.08)
    latent = Latent(bias[:1], F.softplus(bias[1:]))
    torch.testing.assert_close(
        latent, Latent(torch.zeros(1), (1 - posterior.dot(TRUTH)).sqrt()[None]), rtol=0, atol=0.06
    )
    assert weight[1].abs().max() < 0.15  # The deviation does not depend on x.


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_discriminator_gets_no_gradient(reentrant: bool) -> None:
    class Trunk(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return checkpoint(super().forward, input, use_reentrant=reentrant)

    _, encoder, generator = players()
    discriminator = BigBiGANDiscriminator(Trunk(PIXELS, 5), 5, LATENT, hidden_features=8, depth=2).double().eval()
    data, learned = batch(), [*encoder.parameters(), *generator.parameters()]
    torch.manual_seed(0)
    encoder_generator_step(discriminator, encoder, generator, *data).loss.backward()
    assert all(p.requires_grad and p.grad is None for p in discriminator.parameters())
    discriminator.trunk.__class__ = nn.Linear
    torch.manual_seed(0)
    loss = encoder_generator_step(discriminator, encoder, generator, *data).loss
    torch.testing.assert_close([p.grad for p in learned], list(torch.autograd.grad(loss, learned)))
