"""One step of each player: what runs, in one call of the discriminator, and what gets gradients."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paper_layers._core.recompute import reopened
from paper_layers.big_bigan.latent import Latent
from paper_layers.big_bigan.losses import discriminator_loss, encoder_generator_loss
from paper_layers.big_bigan.penalties import r1_penalty
from paper_layers.big_bigan.scores import Scores

Encoder = Callable[[Any], Any]  # Gives a Latent, of which a sample is taken, or latents (N, latent_dim).


class Step(NamedTuple):
    """What a step gives: the loss to call `backward` on, and the scores of real and fake pairs."""

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
) -> Step:
    r"""Compute the discriminator's loss; encoder and generator get no gradient.

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019. Real and fake pairs are scored
    in one call, so that spectral norms are updated once and DDP broadcasts buffers once. Reads the scores to see that
    they are finite, for which a GPU has to finish them.

    Args:
        discriminator: A `BigBiGANDiscriminator`, also within DDP or compiled.
        encoder: From images to a `Latent`, of which one sample is taken, or to latents (N, latent_dim).
        generator: From latents to images.
        images: Real ones.
        latents: Random ones for the generator.
        encoder_images: What the encoder sees, where its resolution is another one; default `images`.
        labels: Those of the real and those of the fake pairs, if the discriminator has classes.
        reduction: As in `discriminator_loss`.
        weights: As in `discriminator_loss`.
        r1_gamma: Adds ``r1_gamma / 2 * r1_penalty`` of the real pairs.

    Returns:
        Loss and scores; the caller differentiates, with its scaler if it has one, and updates.

    Raises:
        TypeError: `labels` is no pair.
        ValueError: A score is not finite, or something does not fit.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers.big_bigan import BigBiGANDiscriminator, LatentHead
        >>> from paper_layers.big_bigan import discriminator_step, encoder_generator_step
        >>> encoder, generator = LatentHead(64, 16, width=32), nn.Linear(16, 64)
        >>> discriminator = BigBiGANDiscriminator(nn.Linear(64, 32), feature_dim=32, latent_dim=16, width=32)
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
    loss = discriminator_loss(real, fake, reduction, weights)
    if r1_gamma:
        loss = loss + r1_gamma / 2 * r1_penalty(real, images)
    return Step(loss, real, fake)


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
) -> Step:
    """Compute the loss of encoder and generator; the discriminator's parameters get no gradient.

    As `discriminator_step`, which has the example. Of a discriminator within DDP the module inside is called, as it has
    no gradients to reduce; encoder and generator within DDP are called as they are.

    Args:
        discriminator: As in `discriminator_step`, and the other arguments as well.
        encoder: As in `discriminator_step`.
        generator: As in `discriminator_step`.
        images: As in `discriminator_step`.
        latents: As in `discriminator_step`.
        encoder_images: As in `discriminator_step`.
        labels: As in `discriminator_step`.
        reduction: As in `encoder_generator_loss`.
        weights: As in `encoder_generator_loss`.

    Raises:
        TypeError: `labels` is no pair.
        ValueError: A score is not finite, or something does not fit.
    """
    if isinstance(discriminator, DistributedDataParallel):
        discriminator = discriminator.module
    encoded = _sampled(encoder(images if encoder_images is None else encoder_images))
    generated = generator(latents)
    with reopened(functools.partial(_frozen, discriminator)):
        real, fake = _score(discriminator, images, encoded, generated, latents, labels)
    return Step(encoder_generator_loss(real, fake, reduction, weights), real, fake)


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
    """The scores of (images, encoded) and of (generated, latents), in one call."""
    if generated.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"generator: expected images of shape {tuple(images.shape[1:])}, as the real ones, "
            f"got {tuple(generated.shape[1:])}"
        )
    if encoded.shape[1:] != latents.shape[1:]:
        raise ValueError(
            f"encoder: expected latents of shape {tuple(latents.shape[1:])}, as latents, got {tuple(encoded.shape[1:])}"
        )
    pairs = [torch.cat([images, generated]), torch.cat([encoded, latents])]
    if labels is not None:
        if not isinstance(labels, tuple | list) or len(labels) != 2:
            raise TypeError(f"labels: expected those of real and those of fake pairs, got {type(labels).__name__}")
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
