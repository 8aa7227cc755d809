"""GANs' discriminators turned into BigBiGAN's: results, unchanged parts, and errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from paper_layers import swap
from paper_layers.big_bigan import BigBiGANDiscriminator, discriminator_step, encoder_generator_step

LATENT = 3
SMALL: dict[str, Any] = {"hidden_features": 8, "depth": 2}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def same(layer: nn.Module) -> nn.Module:
    return layer


def dcgan(norm: Any = same) -> nn.Sequential:
    """PyTorch's DCGAN example: a convolution at the end, and a sigmoid."""
    layers = [norm(nn.Conv2d(1, 4, 4, 2, 1)), nn.LeakyReLU(0.2), norm(nn.Conv2d(4, 6, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, norm(nn.Conv2d(6, 1, 2)), nn.Sigmoid())


class Dense(nn.Module):
    """A linear layer at the end, and a view."""

    def __init__(self, norm: Any = same):
        super().__init__()
        self.last = norm(nn.Linear(12, 1))
        self.body = nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 12)), nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.body(images)).view(-1)


class Patches(nn.Module):
    """Scores of 2 x 2 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(1, 5, 4, 2, 1), nn.Tanh(), nn.Conv2d(5, 1, 4, 2, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def batch(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 8, 8), torch.randn(n, LATENT)


HOSTS: list[Any] = [
    *((build, norm) for build in (dcgan, Dense) for norm in (same, spectral_norm, old_spectral_norm)),
    (lambda norm: Patches(), same),
]


@pytest.mark.parametrize(("build", "norm"), HOSTS)
def test_scores(build: Any, norm: Any) -> None:
    """s_x is the last layer's output, J gets its input, and parameters and keys stay."""
    model = build(norm).eval()
    before = dict(model.named_parameters())
    images, latents = batch()
    twin = copy.deepcopy(model)
    if isinstance(model, nn.Sequential):
        features, x = twin[:4](images).sum((2, 3)), twin[:5](images).flatten()
    elif isinstance(model, Dense):
        features, x = twin.body(images), twin(images)
    else:
        features, x = twin.main[:2](images).sum((2, 3)), twin(images).mean((1, 2, 3))
    assert swap.big_bigan(model, LATENT, **SMALL) is model
    scores = model(images, latents)
    torch.testing.assert_close(scores.x, x)
    torch.testing.assert_close(scores[1:], model.big_bigan(features, latents)[1:])
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"big_bigan"}
    assert isinstance(model, type(twin))
    assert not model.big_bigan.training


def test_layers_in_place_leave_the_scores() -> None:
    model, (images, latents) = dcgan().eval(), batch()
    scores = [
        swap.big_bigan(nn.Sequential(*model[:5], act), LATENT, **SMALL)(images, latents).x
        for act in (nn.ReLU(), nn.ReLU(inplace=True))
    ]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("build", [dcgan, Dense])
@pytest.mark.parametrize("terms", [("x", "z", "xz"), ("x", "z"), ("x",)])
def test_learns(build: Any, terms: tuple[str, ...]) -> None:
    model = swap.big_bigan(build(spectral_norm), LATENT, terms=terms, **SMALL)
    encoder, generator = nn.Sequential(nn.Flatten(), nn.Linear(64, LATENT)), nn.Linear(LATENT, 64)
    shaped = nn.Sequential(generator, nn.Unflatten(1, (1, 8, 8)))
    images, latents = batch()
    step = discriminator_step(model, encoder, shaped, images, latents, r1_gamma=1.0)
    assert set(step.real.terms) == set(terms)
    step.loss.backward()
    assert all(p.grad is not None for p in model.parameters())  # DDP waits for all gradients.
    encoder_generator_step(model, encoder, shaped, images, latents).loss.backward()
    assert generator.weight.grad.any()


class Checkpointed(Dense):
    """Recompute activations in the backward."""

    reentrant = True

    def forward(self, images: Tensor) -> Tensor:
        """Score images."""
        return checkpoint(super().forward, images * self.last.weight.sum(), use_reentrant=self.reentrant)


def test_reentrant_checkpoints_lose_gradients() -> None:
    model = swap.big_bigan(Checkpointed(), LATENT, **SMALL)
    images, latents = batch()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(images, latents)
    with torch.no_grad():
        model(images, latents)
    model.eval()(images, latents)
    model.train().reentrant = False
    model(images, latents).xz.sum().backward()
    assert model.body[1].weight.grad.any()


def test_keeps_mode_place_and_hooks() -> None:
    model = Dense().double().eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.last.register_forward_hook(lambda *_: calls.append("last"))
    swap.big_bigan(model, LATENT, **SMALL)
    assert all(p.dtype == torch.double for p in model.parameters())
    assert not model.big_bigan.training
    model(*(x.double() for x in batch()))
    assert calls == ["last", "model"]
    assert swap.big_bigan(dcgan().to("meta"), LATENT, **SMALL).big_bigan.xz.mlp.blocks[0].fc1.bias.is_meta


def test_twice_is_once() -> None:
    model = swap.big_bigan(dcgan(), LATENT, **SMALL)
    keys = [*model.state_dict()]
    assert swap.big_bigan(model, LATENT, **SMALL) is model
    assert [*model.state_dict()] == keys
    whole = BigBiGANDiscriminator(nn.Flatten(), 64, LATENT, **SMALL)
    assert swap.big_bigan(whole, LATENT) is whole
    for other in (model, whole):
        with pytest.raises(ValueError, match=r"latent_dim=3 .*already, got 4"):
            swap.big_bigan(other, 4)


def test_copies() -> None:
    model = swap.big_bigan(dcgan(), LATENT, spectral_norm=False, projection_spectral_norm=False, **SMALL)
    images, latents = batch()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(images, latents), model(images, latents))
        twin[4].bias.data += 1  # The copy's tap is on its own last layer.
        torch.testing.assert_close(twin(images, latents).x, model(images, latents).x + 1)


def test_autocast_and_compile() -> None:
    model = swap.big_bigan(Dense(), LATENT, **SMALL).eval()
    images, latents = batch()
    expected = model(images, latents)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(images, latents)
    assert all(score.dtype == torch.float32 for score in scores)
    torch.testing.assert_close(scores, expected, rtol=0.05, atol=0.05)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, latents), expected)


def test_filter() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(36, 1), nn.Linear(1, 1))
    swap.big_bigan(model, LATENT, filter_fn=lambda module, name: name != "3", **SMALL)
    assert model.big_bigan.in_features == 36


class Unused(Dense):
    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: swap.big_bigan(torch.relu, 3), TypeError, "model: expected a Module"),  # type: ignore[arg-type]
        (
            lambda: swap.big_bigan(nn.Sequential(nn.Linear(3, 2)), 3),
            ValueError,
            "model: expected at least one nn.Linear or nn.Conv2d with one output, got none in Sequential",
        ),
        (lambda: swap.big_bigan(nn.Linear(3, 1), 3), ValueError, "got none in Linear"),
        (
            lambda: swap.big_bigan(dcgan(), 3, filter_fn=lambda m, n: False),
            ValueError,
            r"that filter_fn accepts \(1 without it\)",
        ),
        (lambda: swap.big_bigan(dcgan(), 3, terms=("xz",)), ValueError, "terms: expected 'x' among them"),
        (lambda: swap.big_bigan(dcgan(), 3, terms=("x", "y")), ValueError, "terms: .* got 'y'"),
        (lambda: swap.big_bigan(dcgan(), 3, pool="max"), ValueError, "pool: .* 'max'"),
        (lambda: swap.big_bigan(dcgan(), 0), ValueError, "latent_dim: "),
        (lambda: swap.big_bigan(dcgan(), 3, num_classes=2), TypeError, "num_classes"),  # type: ignore[call-arg]
        (
            lambda: swap.big_bigan(Unused(), 3, **SMALL)(*batch()),
            ValueError,
            "model: expected a forward that calls the last layer",
        ),
        (
            lambda: swap.big_bigan(dcgan(), 4, **SMALL)(*batch()),
            ValueError,
            r"latents: expected shape \(4, 4\), got \(4, 3\)",
        ),
    ],
)
def test_bad_input(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_errors_change_nothing() -> None:
    model = dcgan()
    with pytest.raises(ValueError, match="depth"):
        swap.big_bigan(model, LATENT, depth=3)
    assert type(model) is nn.Sequential
    assert [*model.state_dict()] == [*dcgan().state_dict()]


def test_lazy_last_layers_run_first() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(1))
    with pytest.raises(ValueError, match=r"knows its sizes, got LazyLinear.*run it once first"):
        swap.big_bigan(model, 2, hidden_features=4)
    model(torch.randn(2, 4))
    assert swap.big_bigan(model, 2, hidden_features=4)(torch.randn(2, 4), torch.randn(2, 2)).x.shape == (2,)
