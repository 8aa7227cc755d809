"""The class that a GAN's discriminator becomes a subclass of."""

from __future__ import annotations

from inspect import Parameter
from typing import Any, cast

import torch
from torch import Tensor

from paper_layers._core.graft import Grafted, OutputTap, SequentialGraft, tapped
from paper_layers._core.tracing import leaf
from paper_layers.big_bigan._pooling import pooled
from paper_layers.big_bigan.discriminator import BigBiGANHeads
from paper_layers.big_bigan.scores import Scores


class InputOutputTap(OutputTap):
    """Keep the last layer's input and each image's score, before an in-place layer overwrites the score."""

    def kept(self, args: Any, output: Any) -> Any:
        """Return the input, and the output's mean over positions."""
        return args[0], output.flatten(1).mean(1)


class BigBiGANHost(Grafted):
    """A GAN's discriminator that scores pairs; see `paper_layers.swap.big_bigan`."""

    _graft_prefix, _graft_added = "BigBiGAN", "big_bigan"
    big_bigan: BigBiGANHeads
    _big_bigan_tap: InputOutputTap
    _big_bigan_pool: str
    _graft_arguments = (Parameter("latents", Parameter.POSITIONAL_OR_KEYWORD, default=None),)

    def forward(self, *images: Any, latents: Tensor | None = None, **kwargs: Any) -> Scores:
        """Return `Scores` (N,) of images and latents (N, latent_dim), in float32 also under autocast.

        Args:
            *images: The host's argument, followed by `latents`.
            latents: None to score images alone.
            **kwargs: The host's argument, by its name.
        """
        _, (seen,) = tapped([self._big_bigan_tap], super().forward, images, kwargs)
        if seen is None:
            raise ValueError("model: expected a forward that calls the last layer, got one that does not")
        features, x = seen
        return score(self.big_bigan, self._big_bigan_pool, features, x, latents)


@leaf
def score(heads: BigBiGANHeads, pool: str, features: Tensor, x: Tensor, latents: Tensor | None) -> Scores:
    """Return the scores of the heads, and the last layer's score as x."""
    features = pooled("the last layer's input", features, pool, heads.in_features)
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return cast(Scores, heads(features, latents))._replace(x=x)


class SequentialHost(SequentialGraft, BigBiGANHost):
    """The same for an `nn.Sequential`."""
