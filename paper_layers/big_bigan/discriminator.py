"""The whole discriminator: an image network, and the heads that score pairs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core.fusing import forward_method, method, within
from paper_layers._core.tracing import Leaf
from paper_layers.big_bigan._pooling import POOLS, pooled
from paper_layers.big_bigan.heads import JointHead, UnaryHead
from paper_layers.big_bigan.scores import _TERMS, Scores, _ordered_terms

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from paper_layers.big_bigan._options import HeadOptions


class BigBiGANHeads(Leaf):
    r"""Score pairs of image features and latents: H, J and the three projections.

    .. math:: s_x = \theta_x \cdot F(x), \quad s_z = \theta_z \cdot H(z), \quad s_{xz} = \theta_{xz} \cdot J(F(x), H(z))

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019. Only the layers that the terms
    need are built. `BigBiGANDiscriminator` adds the image network.

    Args:
        in_features: Size of the image's features F(x).
        latent_dim: Size of the latent z; 120 in the authors' models.
        terms: Scores to compute, of "x", "z" and "xz". "xz" alone is BiGAN, "x" alone a GAN.
        num_classes: Number of classes, for class projections in x and xz as in `ProjectionScore`; None (as in the
            paper) for no class projection.
        **options: `hidden_features`, `depth`, `activation`, `spectral_norm`, `projection_bias`,
            `projection_spectral_norm`: see `UnaryHead`.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is too small; a term or the activation is unknown; no term scores images.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import BigBiGANHeads
        >>> heads = BigBiGANHeads(in_features=32, latent_dim=16, terms=("x", "xz"), hidden_features=64)
        >>> scores = heads(torch.randn(8, 32), torch.randn(8, 16))
        >>> scores.x.shape, scores.z, scores.xz.shape
        (torch.Size([8]), None, torch.Size([8]))
    """

    def __init__(
        self,
        in_features: int,
        latent_dim: int,
        *,
        terms: Iterable[str] = _TERMS,
        num_classes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[HeadOptions],
    ):
        super().__init__()
        self.in_features, self.latent_dim = checks.positive(in_features=in_features, latent_dim=latent_dim)
        self.terms, self.num_classes = _ordered_terms(terms), num_classes
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        image: dict[str, Any] = {**options, **factory, "num_classes": num_classes}
        self.x = UnaryHead(self.in_features, **{**image, "depth": 0}) if "x" in self.terms else None
        scored, needed = "z" in self.terms, {"z", "xz"} & {*self.terms}
        self.z = UnaryHead(self.latent_dim, scored=scored, **options, **factory) if needed else None
        hidden = self.latent_dim if self.z is None else self.z.mlp.out_features
        self.xz = JointHead(self.in_features, hidden, **image) if "xz" in self.terms else None

    def reset_parameters(self) -> None:
        """Initialize all heads again."""
        for head in (self.x, self.z, self.xz):
            if head is not None:
                head.reset_parameters()

    def extra_repr(self) -> str:
        """Return the arguments that the heads do not show."""
        return f"{self.in_features}, {self.latent_dim}, terms={self.terms}"

    def forward(self, features: Tensor, latents: Tensor | None = None, labels: Tensor | None = None) -> Scores:
        """Score features (N, in_features) and latents (N, latent_dim), with labels (N,) if there are classes.

        Latents may be None if no term needs them.
        """
        if labels is not None and self.num_classes is None:
            raise ValueError("labels: expected None without num_classes, got labels")
        x = None if self.x is None else self.x(features, labels)[1]
        if self.z is None:
            return Scores(x)
        if latents is None:
            raise ValueError(f"latents: expected shape (N, {self.latent_dim}), got None")
        checks.shape("latents", latents, (features.shape[0], self.latent_dim))
        hidden, z = self.z(latents)
        return Scores(x, z, None if self.xz is None else self.xz(features, hidden, labels))


class BigBiGANDiscriminator(Leaf):
    r"""BigBiGAN's discriminator on any image network: the scores of images, of latents and of pairs.

    .. math:: s_x = \theta_x \cdot F(x), \quad s_z = \theta_z \cdot H(z), \quad s_{xz} = \theta_{xz} \cdot J(F(x), H(z))

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019. F is the trunk and a sum over
    positions. The trunk brings its own last activation and spectral norms. Score real and fake pairs in one call: two
    calls would update the spectral norms twice, and break DDP's broadcast of buffers.

    Args:
        trunk: Network that maps images to features (N, C), (N, C, H, W) or (N, T, C). A method `forward_features`, as
            timm's models have, is called in place of `forward` (build these models with ``num_classes=0``; otherwise
            the classifier gets no gradients and DDP fails).
        in_features: Size C of the trunk's features.
        latent_dim: Size of the latent z; 120 in the authors' models.
        terms: Scores to compute, of "x", "z" and "xz". "xz" alone is BiGAN, "x" alone a GAN.
        pool: "sum" over positions, as in BigGAN's discriminator, or "mean".
        num_classes: Number of classes, as in `BigBiGANHeads`.
        device: Device of the heads.
        dtype: Dtype of the heads.
        **options: `hidden_features`, `depth`, `activation`, `spectral_norm`, `projection_bias`,
            `projection_spectral_norm`: see `UnaryHead`.

    Raises:
        TypeError: The trunk is not a module, a number is not an int, or an option is unknown.
        ValueError: See `BigBiGANHeads`; `pool` is unknown.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers.big_bigan import BigBiGANDiscriminator
        >>> trunk = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2), nn.ReLU())
        >>> discriminator = BigBiGANDiscriminator(trunk, in_features=32, latent_dim=16, hidden_features=64)
        >>> scores = discriminator(torch.randn(8, 3, 32, 32), torch.randn(8, 16))
        >>> scores.x.shape, scores.z.shape, scores.xz.shape
        (torch.Size([8]), torch.Size([8]), torch.Size([8]))
    """

    def __init__(
        self,
        trunk: nn.Module,
        in_features: int,
        latent_dim: int,
        *,
        terms: Iterable[str] = _TERMS,
        pool: str = "sum",
        num_classes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[HeadOptions],
    ):
        super().__init__()
        if not isinstance(trunk, nn.Module):
            raise TypeError(f"trunk: expected a Module, got {type(trunk).__name__}")
        checks.choice("pool", pool, POOLS)
        self.trunk, self.pool = trunk, pool
        heads: dict[str, Any] = {"terms": terms, "num_classes": num_classes, "device": device, "dtype": dtype}
        self.heads = BigBiGANHeads(in_features, latent_dim, **heads, **options)

    def reset_parameters(self) -> None:
        """Initialize the heads again; the trunk stays as it is."""
        self.heads.reset_parameters()

    def extra_repr(self) -> str:
        """Return the arguments that the parts do not show."""
        return f"pool={self.pool!r}"

    @forward_method
    def features(self, images: Tensor) -> Tensor:
        """Return the features F(x), of shape (N, in_features)."""
        run = method(self.trunk, "forward_features") if hasattr(self.trunk, "forward_features") else self.trunk
        return pooled("the trunk's output (C = in_features)", run(images), self.pool, self.heads.in_features)

    def forward(self, images: Tensor, latents: Tensor | None = None, labels: Tensor | None = None) -> Scores:
        """Score pairs.

        Args:
            images: N images, as the trunk takes them.
            latents: Shape (N, latent_dim): the encoder's output for real images, the generator's input for fake ones.
                None if no term needs them.
            labels: int64 of shape (N,), if there are classes.

        Returns:
            `Scores` of shape (N,) each, in float32 also under autocast.
        """
        return self.heads(within(self, "features")(images), latents, labels)
