"""The discriminator of a GAN becomes one of BigBiGAN."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import Parameter
from typing import Any, cast

import torch
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core.graft import Grafted, OutputTap, SequentialGraft, graft, tapped
from paper_layers._core.surgery import Filter, check_names, check_sizes, device_and_dtype
from paper_layers._core.tracing import leaf
from paper_layers._core.wrapped import check_free
from paper_layers.big_bigan import BigBiGANDiscriminator, BigBiGANHeads, Scores
from paper_layers.big_bigan.pooling import POOLS, pooled
from paper_layers.big_bigan.scores import TERMS, chosen_terms


class InputOutputTap(OutputTap):
    """Hands over the last layer's input, and each image's score, before a layer in place writes over it."""

    def kept(self, args: Any, output: Any) -> Any:
        """Return both."""
        return args[0], output.flatten(1).mean(1)


class BigBiGANHost(Grafted):
    """A GAN's discriminator that scores pairs; see `paper_layers.swap.bigan_discriminator`."""

    _graft_prefix, _graft_added = "BigBiGAN", "big_bigan"
    big_bigan: BigBiGANHeads
    _big_bigan_tap: InputOutputTap
    _big_bigan_pool: str
    _graft_arguments = (Parameter("latents", Parameter.POSITIONAL_OR_KEYWORD, default=None),)

    def forward(self, *images: Any, latents: Tensor | None = None, **kwargs: Any) -> Scores:
        """`Scores` (N,) of images and latents (N, latent_dim), in float32 also under autocast.

        Args:
            *images: The host's argument, and `latents` after it.
            latents: None for the scores of images alone.
            **kwargs: The host's argument, by its name.
        """
        _, (seen,) = tapped([self._big_bigan_tap], super().forward, images, kwargs)
        if seen is None:
            raise ValueError("model: expected a forward that calls the last layer, got one that does not")
        features, x = seen
        return score(self.big_bigan, self._big_bigan_pool, features, x, latents)


@leaf
def score(heads: BigBiGANHeads, pool: str, features: Tensor, x: Tensor, latents: Tensor | None) -> Scores:
    """Return all scores, where the host's last layer gives one of them."""
    features = pooled("the last layer's input", features, pool, heads.feature_dim, "its size")
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return cast(Scores, heads(features, latents))._replace(x=x)


class SequentialHost(SequentialGraft, BigBiGANHost):
    """An nn.Sequential."""


def bigan_discriminator(
    model: nn.Module,
    latent_dim: int,
    *,
    terms: Iterable[str] = TERMS,
    pool: str = "sum",
    width: int = 2048,
    depth: int = 8,
    activation: str = "pre",
    spectral_norm: bool = True,
    projection_bias: bool = True,
    projection_spectral_norm: bool = True,
    filter_fn: Filter | None = None,
) -> nn.Module:
    """Turn a finished GAN's discriminator into one of BigBiGAN, which scores images and latents.

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019. The last `nn.Linear` or
    `nn.Conv2d` with one output, in the order of `named_modules`, is the projection of :math:`s_x`, and its input the
    image's features F(x). What follows it, such as a sigmoid, no longer counts; of several places' scores (PatchGAN)
    the mean is taken. H, J and their projections are added, under ``big_bigan.``; all parameters that there were stay
    the same objects under the same keys. `forward` takes images and latents and returns `Scores`, as that of
    `BigBiGANDiscriminator`, for the steps and losses. In these steps batch norms see real and fake images together.

    Args:
        model: A discriminator, of images alone; changed in place.
        latent_dim: Size of the latent z; 120 in the authors' models.
        terms: Which scores, "x" among them: "x", "z", "xz".
        pool: "sum" over the places of F(x), or "average", where the last layer is a convolution.
        width: As in `BigBiGANHeads`, and the following as well.
        depth: As in `BigBiGANHeads`.
        activation: As in `BigBiGANHeads`.
        spectral_norm: As in `BigBiGANHeads`.
        projection_bias: As in `BigBiGANHeads`.
        projection_spectral_norm: As in `BigBiGANHeads`.
        filter_fn: ``filter_fn(module, name) -> bool``, which layers may be the last one; default all.

    Returns:
        `model`; unchanged if it is a discriminator of BigBiGAN already.

    Raises:
        TypeError: `model` is not a module, or a number no int.
        ValueError: There is no such layer; "x" is not among the terms; the model is a discriminator of BigBiGAN with
            another `latent_dim` or other terms; arguments as in `BigBiGANHeads`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers import swap
        >>> gan = nn.Sequential(nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 4), nn.Sigmoid())
        >>> discriminator = swap.bigan_discriminator(gan, latent_dim=16, width=64)
        >>> scores = discriminator(torch.randn(8, 3, 8, 8), torch.randn(8, 16))
        >>> scores.x.shape, scores.z.shape, scores.xz.shape
        (torch.Size([8]), torch.Size([8]), torch.Size([8]))
    """
    check_free(model)
    terms = chosen_terms(terms)
    if "x" not in terms:
        raise ValueError(f"terms: expected 'x' among them, which the last layer gives, got {terms!r}")
    checks.choice("pool", pool, POOLS)
    if isinstance(model, BigBiGANHost | BigBiGANDiscriminator):
        heads = model.big_bigan if isinstance(model, BigBiGANHost) else model.heads
        if (heads.latent_dim, heads.terms) != (latent_dim, terms):
            raise ValueError(
                f"model: expected latent_dim={heads.latent_dim} and terms={heads.terms}, as it is one of BigBiGAN "
                f"already, got {latent_dim} and {terms}"
            )
        return model
    name, last = _last_layer(model, filter_fn)
    check_sizes([(name, last)])
    if "forward" in vars(model):
        raise ValueError("model: expected the forward of its class, got one set on the object")
    ours = SequentialHost if isinstance(model, nn.Sequential) else BigBiGANHost
    check_names(model, "", ours, ["big_bigan", "_big_bigan_tap", "_big_bigan_pool"])
    features = last.in_features if isinstance(last, nn.Linear) else last.in_channels
    options = (width, depth, activation, spectral_norm, None, projection_bias, projection_spectral_norm)
    heads = BigBiGANHeads(features, latent_dim, terms, *options, **device_and_dtype(model, name))
    heads.x = None  # The last layer is.
    host = cast(Any, model)
    host.__class__ = graft(ours, host.__class__)
    model.big_bigan = heads.train(model.training)
    model._big_bigan_tap, model._big_bigan_pool = InputOutputTap(last), pool  # type: ignore[assignment]
    return model


def _last_layer(model: nn.Module, filter_fn: Filter | None) -> tuple[str, nn.Linear | nn.Conv2d]:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if module is not model
        and (
            (isinstance(module, nn.Linear) and module.out_features == 1)
            or (isinstance(module, nn.Conv2d) and module.out_channels == 1)
        )
    ]
    chosen = [(name, module) for name, module in found if filter_fn is None or filter_fn(module, name)]
    if not chosen:
        rejected = f" that filter_fn accepts ({len(found)} without it)" if found else ""
        raise ValueError(
            f"model: expected at least one nn.Linear or nn.Conv2d with one output{rejected}, "
            f"got none in {type(model).__name__}"
        )
    return chosen[-1]
