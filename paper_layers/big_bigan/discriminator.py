"""The whole discriminator: an image network, and the heads that make three scores of pairs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core.fusing import forward_method, method, within
from paper_layers._core.tracing import Leaf
from paper_layers.big_bigan.heads import JointHead, UnaryHead
from paper_layers.big_bigan.pooling import POOLS, pooled
from paper_layers.big_bigan.scores import TERMS, Scores, chosen_terms


class BigBiGANHeads(Leaf):
    r"""Score pairs of image features and latents: H, J and the three projections.

    .. math:: s_x = \theta_x \cdot F(x), \quad s_z = \theta_z \cdot H(z), \quad s_{xz} = \theta_{xz} \cdot J(F(x), H(z))

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019. Only what the terms need is
    built. `BigBiGANDiscriminator` has the image network as well.

    Args:
        feature_dim: Size of the image's features F(x).
        latent_dim: Size of the latent z; 120 in the authors' models.
        terms: Which scores: "x", "z", "xz". "xz" alone is BiGAN, "x" alone a GAN.
        width: Size of the hidden layers of H and J.
        depth: Layers of each, in residual blocks of two.
        activation: "pre" or "post", as in `ResidualMLP`; not documented in the paper.
        spectral_norm: Of the weights of H and J.
        num_classes: Classes of labels, which are projected on in x and xz, as in `Score`; None for none, as in the
            paper.
        projection_bias: Whether the projections have a bias; not documented.
        projection_spectral_norm: Whether they have a spectral norm; not documented.
        device: Where the parameters are.
        dtype: Their dtype.

    Raises:
        TypeError: A number is no int.
        ValueError: A number is too small; a term or activation is unknown; no term sees images.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import BigBiGANHeads
        >>> heads = BigBiGANHeads(feature_dim=32, latent_dim=16, terms=("x", "xz"), width=64)
        >>> scores = heads(torch.randn(8, 32), torch.randn(8, 16))
        >>> scores.x.shape, scores.z, scores.xz.shape
        (torch.Size([8]), None, torch.Size([8]))
    """

    def __init__(
        self,
        feature_dim: int,
        latent_dim: int,
        terms: Iterable[str] = TERMS,
        width: int = 2048,
        depth: int = 8,
        activation: str = "pre",
        spectral_norm: bool = True,
        num_classes: int | None = None,
        projection_bias: bool = True,
        projection_spectral_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        feature_dim = checks.integer("feature_dim", feature_dim, 1)
        latent_dim = checks.integer("latent_dim", latent_dim, 1)
        self.feature_dim, self.latent_dim, self.terms = feature_dim, latent_dim, chosen_terms(terms)
        self.num_classes = num_classes
        layers: dict[str, Any] = {"width": width, "activation": activation, "spectral_norm": spectral_norm}
        layers |= {"projection_bias": projection_bias, "projection_spectral_norm": projection_spectral_norm}
        layers |= {"device": device, "dtype": dtype}
        image: dict[str, Any] = {**layers, "num_classes": num_classes}
        scored = "z" in self.terms
        self.x = UnaryHead(feature_dim, depth=0, **image) if "x" in self.terms else None
        self.z = UnaryHead(latent_dim, depth=depth, scored=scored, **layers) if {"z", "xz"} & {*self.terms} else None
        hidden = latent_dim if self.z is None else self.z.mlp.out_features
        self.xz = JointHead(feature_dim, hidden, depth=depth, **image) if "xz" in self.terms else None

    def reset_parameters(self) -> None:
        """Start again."""
        for head in (self.x, self.z, self.xz):
            if head is not None:
                head.reset_parameters()

    def extra_repr(self) -> str:
        """What the heads do not show."""
        return f"{self.feature_dim}, {self.latent_dim}, terms={self.terms}"

    def forward(self, features: Tensor, latents: Tensor | None = None, labels: Tensor | None = None) -> Scores:
        """Score features (N, feature_dim) and latents (N, latent_dim), with labels (N,) if there are classes.

        Latents may be None where no term needs them.
        """
        if labels is not None and self.num_classes is None:
            raise ValueError("labels: expected None without num_classes, got labels")
        x = None if self.x is None else self.x(features, labels)[1]
        if self.z is None:
            return Scores(x)
        if latents is None:
            raise ValueError(f"latents: expected shape (N, {self.latent_dim}), as latent_dim says, got None")
        if latents.shape != (features.shape[0], self.latent_dim):
            expected = f"({features.shape[0]}, {self.latent_dim}), as the images and latent_dim say"
            raise ValueError(f"latents: expected shape {expected}, got {tuple(latents.shape)}")
        hidden, z = self.z(latents)
        return Scores(x, z, None if self.xz is None else self.xz(features, hidden, labels))


class BigBiGANDiscriminator(Leaf):
    r"""BigBiGAN's discriminator on any image network: the scores of images, of latents and of pairs.

    .. math:: s_x = \theta_x \cdot F(x), \quad s_z = \theta_z \cdot H(z), \quad s_{xz} = \theta_{xz} \cdot J(F(x), H(z))

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019. F is the trunk with a sum over
    places; an activation at its end and its spectral norms are the trunk's own affair. Score real and fake
    pairs in one call: of two, each would update the spectral norms, and break DDP's broadcast of buffers.

    Args:
        trunk: Gives features (N, C), (N, C, H, W) or (N, T, C) of images. If it has a method `forward_features`, as
            timm's models do, that is called (build them with ``num_classes=0``, or DDP misses the classifier's
            gradients).
        feature_dim: C.
        latent_dim: Size of the latent z; 120 in the authors' models.
        terms: Which scores: "x", "z", "xz". "xz" alone is BiGAN, "x" alone a GAN.
        pool: "sum" over places, as in BigGAN's discriminator, or "average".
        **options: As in `BigBiGANHeads`: `width`, `depth`, `activation`, `spectral_norm`, `num_classes`,
            `projection_bias`, `projection_spectral_norm`, `device`, `dtype`.

    Raises:
        TypeError: The trunk is no module, a number no int, or an option unknown.
        ValueError: As in `BigBiGANHeads`; `pool` is unknown.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers.big_bigan import BigBiGANDiscriminator
        >>> trunk = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2), nn.ReLU())
        >>> discriminator = BigBiGANDiscriminator(trunk, feature_dim=32, latent_dim=16, width=64)
        >>> scores = discriminator(torch.randn(8, 3, 32, 32), torch.randn(8, 16))
        >>> scores.x.shape, scores.z.shape, scores.xz.shape
        (torch.Size([8]), torch.Size([8]), torch.Size([8]))
    """

    def __init__(
        self,
        trunk: nn.Module,
        feature_dim: int,
        latent_dim: int,
        terms: Iterable[str] = TERMS,
        pool: str = "sum",
        **options: Any,
    ):
        super().__init__()
        if not isinstance(trunk, nn.Module):
            raise TypeError(f"trunk: expected a Module, got {type(trunk).__name__}")
        checks.choice("pool", pool, POOLS)
        self.trunk, self.pool = trunk, pool
        self.heads = BigBiGANHeads(feature_dim, latent_dim, terms, **options)

    def reset_parameters(self) -> None:
        """Start the heads again. How the trunk starts is its own affair."""
        self.heads.reset_parameters()

    def extra_repr(self) -> str:
        """What the parts do not show."""
        return f"pool={self.pool!r}"

    @forward_method
    def features(self, images: Tensor) -> Tensor:
        """F(x), of shape (N, feature_dim)."""
        run = method(self.trunk, "forward_features") if hasattr(self.trunk, "forward_features") else self.trunk
        return pooled("the trunk's output", run(images), self.pool, self.heads.feature_dim, "feature_dim")

    def forward(self, images: Tensor, latents: Tensor | None = None, labels: Tensor | None = None) -> Scores:
        """Score pairs.

        Args:
            images: Whatever the trunk takes, N images.
            latents: Of shape (N, latent_dim): the encoder's for real images, the generator's for fake ones. None if
                no term needs them.
            labels: int64 of shape (N,), if there are classes.

        Returns:
            `Scores` of shape (N,) each, in float32 also under autocast.
        """
        return self.heads(within(self, "features")(images), latents, labels)
