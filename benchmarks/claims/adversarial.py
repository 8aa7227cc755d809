"""Small convolutional players of BigBiGAN for 16 x 16 images, and their resumable training."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from paper_layers.big_bigan import BigBiGANDiscriminator, LatentHead, discriminator_step, encoder_generator_step

SIZE = 16  # Height and width of the images; values are from -1 to 1.
CHANNELS = 32  # Channels of the last maps, 4 x 4; earlier maps have fewer.
LATENT, WIDTH, DEPTH = 32, 128, 2  # WIDTH and DEPTH of the MLPs in H, J and the encoder.
BATCH = 64
RATES = {"discriminator": 4e-4, "players": 2e-4}  # Learning rates of Adam.
AVERAGE = 0.995  # Decay of the generator's running average, which is evaluated.


@dataclass(frozen=True)
class Variant:
    """A choice of scores, and of samples or means as the latents of images."""

    terms: tuple[str, ...] = ("x", "z", "xz")
    stochastic: bool = True


class Encoder(nn.Module):
    """Map images (N, 1, 16, 16) to latents."""

    def __init__(self, stochastic: bool = True):
        super().__init__()
        self.stochastic = stochastic
        self.trunk = nn.Sequential(*_down(1, CHANNELS // 2, norm=True), *_down(CHANNELS // 2, CHANNELS, norm=True))
        self.trunk.append(nn.Flatten())
        self.head = LatentHead(16 * CHANNELS, LATENT, hidden_features=WIDTH, depth=DEPTH)

    def forward(self, images: Tensor) -> Any:
        latent = self.head(self.trunk(images))
        return latent if self.stochastic else latent.mean

    def features(self, images: Tensor) -> Tensor:
        """Return the features before the last, linear layer."""
        return self.head.mlp(self.trunk(images))


def _down(before: int, channels: int, norm: bool) -> list[nn.Module]:
    conv = nn.Conv2d(before, channels, 4, 2, 1, bias=not norm)
    if norm:
        return [conv, nn.BatchNorm2d(channels), nn.LeakyReLU(0.1, inplace=True)]
    return [spectral_norm(conv), nn.LeakyReLU(0.1, inplace=True)]


def generator() -> nn.Sequential:
    """Build a network from latents to images."""
    size = (CHANNELS, 4, 4)
    layers: list[nn.Module] = [nn.Linear(LATENT, math.prod(size), bias=False), nn.Unflatten(1, size)]
    layers += [nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)]
    layers += [nn.ConvTranspose2d(CHANNELS, CHANNELS // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(CHANNELS // 2)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True), nn.ConvTranspose2d(CHANNELS // 2, 1, 4, 2, 1), nn.Tanh())


def discriminator(terms: tuple[str, ...]) -> BigBiGANDiscriminator:
    """Build a discriminator of images and latents."""
    layers = [*_down(1, CHANNELS // 2, norm=False), *_down(CHANNELS // 2, CHANNELS, norm=False), nn.Flatten()]
    options: Any = {"terms": terms, "hidden_features": WIDTH, "depth": DEPTH}
    return BigBiGANDiscriminator(nn.Sequential(*layers), 16 * CHANNELS, LATENT, **options)


class Training:
    """Three players, their optimizers, and the running average of the generator."""

    def __init__(self, variant: Variant, seed: int):
        torch.manual_seed(seed)
        self.encoder, self.generator = Encoder(variant.stochastic), generator()
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.discriminator = discriminator(variant.terms)
        players = [*self.encoder.parameters(), *self.generator.parameters()]
        self.optimizers = [
            torch.optim.Adam(parameters, rate, (0.5, 0.999), fused=True)
            for parameters, rate in zip((self.discriminator.parameters(), players), RATES.values(), strict=True)
        ]
        self.done = 0  # Steps done.

    @property
    def _parts(self) -> list[Any]:
        return [self.encoder, self.generator, self.average, self.discriminator, *self.optimizers]

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        return {"done": self.done, "rng": torch.get_rng_state(), "parts": [part.state_dict() for part in self._parts]}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a `state`."""
        self.done = state["done"]
        torch.set_rng_state(state["rng"])
        for part, values in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(values)

    def run(
        self, images: Tensor, steps: int, checkpoint: Path | None = None, every: int = 500, progress: str | None = None
    ) -> None:
        """Train until `steps` are done, from the checkpoint if it exists; write it every `every` steps."""
        if checkpoint is not None and checkpoint.exists():
            self.load(torch.load(checkpoint, weights_only=True))
        bar = tqdm(total=steps, initial=self.done, desc=progress, unit="step", disable=progress is None)
        with bar:
            while self.done < steps:
                losses = self._step(images)
                self.done += 1
                bar.update()
                if self.done % 50 == 0:
                    bar.set_postfix_str("losses {:.2f}, {:.2f}".format(*(loss.item() for loss in losses)))
                if checkpoint is not None and (self.done % every == 0 or self.done == steps):
                    checkpoint.parent.mkdir(parents=True, exist_ok=True)
                    torch.save(self.state(), checkpoint.with_suffix(".new"))
                    checkpoint.with_suffix(".new").replace(checkpoint)  # Atomic: never a partial file.

    def _step(self, images: Tensor) -> list[Tensor]:
        losses = []
        for step, optimizer in zip((discriminator_step, encoder_generator_step), self.optimizers, strict=True):
            batch = images[torch.randint(len(images), (BATCH,))]
            latents = torch.randn(BATCH, LATENT)
            loss = step(self.discriminator, self.encoder, self.generator, batch, latents).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        with torch.no_grad():
            for mean, new in zip(self.average.parameters(), self.generator.parameters(), strict=True):
                mean.lerp_(new, 1 - AVERAGE)
            for mean, new in zip(self.average.buffers(), self.generator.buffers(), strict=True):
                mean.copy_(new)
        return losses
