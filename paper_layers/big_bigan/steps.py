"""One step of each player, with one call of the discriminator."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paper_layers._core import checks
from paper_layers._core.recompute import reopened
from paper_layers.big_bigan.latent import Latent
from paper_layers.big_bigan.losses import discriminator_loss, encoder_generator_loss
from paper_layers.big_bigan.penalties import r1_penalty
from paper_layers.big_bigan.scores import Scores

Encoder = Callable[[Any], Any]  # Returns a Latent or latents (N, latent_dim).


class StepResult(NamedTuple):
    """The loss of a step and its scores.

    Attributes:
        loss: Shape (); call `backward` on it.
        real: Scores of real images with their encodings.
        fake: Scores of generated images with their latents.
    """

    loss: Tensor
    real: Scores
    fake: Scores


def discriminator_step(
    discriminator: Callable[..., Scores],
    encoder: Encoder,
    generator: Callable[[Tensor], Tensor],
    images: Tensor,
    latents: Tensor,
    *,
    encoder_images: Tensor | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    reduction: str = "sum",
    weights: Mapping[str, float] | None = None,
    r1_gamma: float = 0.0,
) -> StepResult:
    r"""Compute the discriminator's loss; encoder and generator get no gradient.

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019. Real and fake pairs are scored
    in one call, so spectral norms are updated once and DDP broadcasts buffers once. The step checks that the scores are
    finite, so the CPU waits for the GPU.

    Args:
        discriminator: A `BigBiGANDiscriminator`, also in DDP or compiled.
        encoder: Maps images to a `Latent`, from which one sample is drawn, or to latents (N, latent_dim).
        generator: Maps latents to images.
        images: Real images.
        latents: Random latents for the generator.
        encoder_images: Images for the encoder, if it takes another resolution; default `images`.
        labels: Labels of the real and of the fake pairs, if the discriminator has classes.
        reduction: See `discriminator_loss`.
        weights: See `discriminator_loss`.
        r1_gamma: Adds ``r1_gamma / 2 * r1_penalty`` on the real pairs.

    Returns:
        Loss and scores; the caller calls `backward` and updates the parameters.

    Raises:
        TypeError: `labels` is not a pair.
        ValueError: A score is not finite; the shapes of images, latents or labels differ; see `discriminator_loss`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers.big_bigan import BigBiGANDiscriminator, LatentHead
        >>> from paper_layers.big_bigan import discriminator_step, encoder_generator_step
        >>> encoder, generator = LatentHead(64, 16, hidden_features=32), nn.Linear(16, 64)
        >>> discriminator = BigBiGANDiscriminator(nn.Linear(64, 32), 32, 16, hidden_features=32)
        >>> images, latents = torch.randn(8, 64), torch.randn(8, 16)
        >>> discriminator_step(discriminator, encoder, generator, images, latents).loss.backward()
        >>> encoder_generator_step(discriminator, encoder, generator, images, latents).loss.backward()
    """
    with torch.no_grad():
        encoded = _sampled(encoder(images if encoder_images is None else encoder_images))
        generated = generator(latents)
    if r1_gamma:
        images = images.detach().requires_grad_()
    real, fake = _score(discriminator, images, encoded, generated, latents, labels)
    loss = discriminator_loss(real, fake, reduction=reduction, weights=weights)
    if r1_gamma:
        loss = loss + r1_gamma / 2 * r1_penalty(real, images)
    return StepResult(loss, real, fake)


def encoder_generator_step(
    discriminator: Callable[..., Scores],
    encoder: Encoder,
    generator: Callable[[Tensor], Tensor],
    images: Tensor,
    latents: Tensor,
    *,
    encoder_images: Tensor | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    reduction: str = "sum",
    weights: Mapping[str, float] | None = None,
) -> StepResult:
    """Compute the loss of encoder and generator; the discriminator's parameters get no gradient.

    `discriminator_step` documents the arguments and errors. If the discriminator is in DDP, the module inside is
    called, as it has no gradients to reduce. Encoder and generator in DDP are called as they are.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers.big_bigan import BigBiGANDiscriminator, encoder_generator_step
        >>> encoder, generator = nn.Linear(6, 2), nn.Linear(2, 6)
        >>> discriminator = BigBiGANDiscriminator(nn.Identity(), in_features=6, latent_dim=2, hidden_features=8)
        >>> step = encoder_generator_step(discriminator, encoder, generator, torch.randn(4, 6), torch.randn(4, 2))
        >>> step.loss.backward()
    """
    if isinstance(discriminator, DistributedDataParallel):
        discriminator = discriminator.module
    encoded = _sampled(encoder(images if encoder_images is None else encoder_images))
    generated = generator(latents)
    with reopened(functools.partial(_frozen, discriminator)):
        real, fake = _score(discriminator, images, encoded, generated, latents, labels)
    return StepResult(encoder_generator_loss(real, fake, reduction=reduction, weights=weights), real, fake)


def _sampled(latent: Any) -> Tensor:
    return latent.sample() if isinstance(latent, Latent) else latent


@contextlib.contextmanager
def _frozen(discriminator: Any) -> Iterator[None]:
    """Keep the discriminator's parameters out of the graph inside this block."""
    parameters = discriminator.parameters() if isinstance(discriminator, nn.Module) else ()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _score(
    discriminator: Callable[..., Scores],
    images: Tensor,
    encoded: Tensor,
    generated: Tensor,
    latents: Tensor,
    labels: tuple[Tensor, Tensor] | None,
) -> tuple[Scores, Scores]:
    """Score (images, encoded) and (generated, latents) in one call."""
    checks.shape("generator(latents)", generated, ("N", *images.shape[1:]))
    checks.shape("encoder(images)", encoded, ("N", *latents.shape[1:]))
    pairs = [torch.cat([images, generated]), torch.cat([encoded, latents])]
    if labels is not None:
        if not isinstance(labels, tuple | list) or len(labels) != 2:
            raise TypeError(f"labels: expected a pair, for real and fake pairs, got {type(labels).__name__}")
        pairs.append(torch.cat(labels))
    scores = discriminator(*pairs)
    real, fake = scores.split(images.shape[0])
    _check_finite(real, fake)
    return real, fake


def _check_finite(real: Scores, fake: Scores) -> None:
    parts = [(kind, name, s) for kind, of in (("real", real), ("fake", fake)) for name, s in of.terms.items()]
    counts = torch.stack([s.detach().isfinite().logical_not().sum() for _, _, s in parts]).tolist()
    for (kind, name, score), count in zip(parts, counts, strict=True):
        if count:
            raise ValueError(
                f"s_{name} of {kind} pairs: expected finite scores, got {count} of {score.numel()} that are not"
            )
