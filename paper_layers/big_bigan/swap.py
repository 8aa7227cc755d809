"""Turn a GAN's discriminator into BigBiGAN's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from paper_layers._core import checks
from paper_layers._core.graft import graft
from paper_layers._core.surgery import Filter, M, check_names, check_sizes, device_and_dtype
from paper_layers._core.wrapped import check_free
from paper_layers.big_bigan._host import BigBiGANHost, InputOutputTap, SequentialHost
from paper_layers.big_bigan._pooling import POOLS
from paper_layers.big_bigan.discriminator import BigBiGANDiscriminator, BigBiGANHeads
from paper_layers.big_bigan.scores import _TERMS, _ordered_terms

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from paper_layers.big_bigan._options import HeadOptions


def big_bigan(
    model: M,
    latent_dim: int,
    *,
    terms: Iterable[str] = _TERMS,
    pool: str = "sum",
    filter_fn: Filter | None = None,
    **options: Unpack[HeadOptions],
) -> M:
    """Turn a finished GAN's discriminator into BigBiGAN's, which scores images and latents.

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019. The last `nn.Linear` or
    `nn.Conv2d` with one output, in the order of `named_modules`, becomes the projection of :math:`s_x`, and its input
    the image's features F(x). Layers after it, such as a sigmoid, no longer matter. If it scores several positions
    (PatchGAN), :math:`s_x` is their mean. H, J and their projections are added under ``big_bigan.``; all other
    parameters stay the same objects under the same keys. `forward` takes images and latents and returns `Scores`, like
    `BigBiGANDiscriminator`, for the steps and losses. In these steps, batch norms see real and fake images together.

    Args:
        model: A discriminator that takes only images; changed in place.
        latent_dim: Size of the latent z; 120 in the authors' models.
        terms: Scores to compute, of "x", "z" and "xz"; "x" is required.
        pool: "sum" or "mean" over the positions of F(x), if the last layer is a convolution.
        filter_fn: ``filter_fn(module, name) -> bool`` selects candidates for the last layer; default all.
        **options: `hidden_features`, `depth`, `activation`, `spectral_norm`, `projection_bias`,
            `projection_spectral_norm`: see `paper_layers.big_bigan.UnaryHead`.

    Returns:
        `model`, unchanged if it is already BigBiGAN's.

    Raises:
        TypeError: `model` is not a module, a number is not an int, or an option is unknown.
        ValueError: No layer is suitable; "x" is not among the terms; the model is already BigBiGAN's, with another
            `latent_dim` or other terms; see `BigBiGANHeads`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers import swap
        >>> gan = nn.Sequential(nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 4), nn.Sigmoid())
        >>> discriminator = swap.big_bigan(gan, latent_dim=16, hidden_features=64)
        >>> scores = discriminator(torch.randn(8, 3, 8, 8), torch.randn(8, 16))
        >>> scores.x.shape, scores.z.shape, scores.xz.shape
        (torch.Size([8]), torch.Size([8]), torch.Size([8]))
    """
    check_free(model)
    terms = _ordered_terms(terms)
    if "x" not in terms:
        raise ValueError(f"terms: expected 'x' among them, which the last layer gives, got {terms!r}")
    checks.choice("pool", pool, POOLS)
    if isinstance(model, BigBiGANHost | BigBiGANDiscriminator):
        heads = model.big_bigan if isinstance(model, BigBiGANHost) else model.heads
        if (heads.latent_dim, heads.terms) != (latent_dim, terms):
            raise ValueError(
                f"model: expected latent_dim={heads.latent_dim} and terms={heads.terms}, as it is BigBiGAN's already, "
                f"got {latent_dim} and {terms}"
            )
        return model
    name, last = _last_layer(model, filter_fn)
    check_sizes([(name, last)])
    if "forward" in vars(model):
        raise ValueError("model: expected the forward of its class, got one set on the object")
    ours = SequentialHost if isinstance(model, nn.Sequential) else BigBiGANHost
    check_names(model, "", ours, ["big_bigan", "_big_bigan_tap", "_big_bigan_pool"])
    features = last.in_features if isinstance(last, nn.Linear) else last.in_channels
    # An explicit num_classes makes an option of this name an error: the host's forward has no labels.
    fixed: dict[str, Any] = {"terms": terms, "num_classes": None, **device_and_dtype(model, name)}
    heads = BigBiGANHeads(features, latent_dim, **fixed, **options)
    heads.x = None  # The last layer computes this score.
    host: Any = model
    host.__class__ = graft(ours, host.__class__)
    host.big_bigan = heads.train(model.training)
    host._big_bigan_tap, host._big_bigan_pool = InputOutputTap(last), pool
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
