"""The encoder's head: a normal distribution of latents for each image."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core.fusing import parameter_dtype
from paper_layers._core.tracing import Leaf
from paper_layers.big_bigan._init import init_orthogonal_
from paper_layers.big_bigan._named_tuples import exported
from paper_layers.big_bigan._pooling import POOLS, pooled
from paper_layers.big_bigan.mlp import ResidualMLP


@exported
class Latent(NamedTuple):
    """A normal distribution of latents.

    Attributes:
        mean: Shape (N, latent_dim).
        std: Standard deviation, shape (N, latent_dim).
    """

    mean: Tensor
    std: Tensor

    def sample(self) -> Tensor:
        """Draw one latent from each distribution, with torch's random state; gradients flow to mean and std."""
        return torch.addcmul(self.mean, self.std, torch.randn_like(self.std))


class LatentHead(Leaf):
    r"""Turn an image network into BigBiGAN's stochastic encoder: predict latents from its features.

    .. math:: z = \mu + \mathrm{softplus}(\hat\sigma) \, \epsilon, \quad \epsilon \sim N(0, I)

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019: average pool, residual MLP, and
    one linear layer for :math:`\mu` and :math:`\hat\sigma`; no KL term. The discriminator sees a sample, not the mean.

    Args:
        in_features: Channels C of the features.
        latent_dim: Size of the latent.
        hidden_features: Size of the MLP's layers.
        depth: Number of the MLP's layers, even; 0 for no MLP.
        activation: "pre" or "post", as in `ResidualMLP`; not specified in the paper.
        spectral_norm: Give all weights spectral norm 1; not specified for the encoder.
        pool: "mean" or "sum" over positions.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is too small, `depth` is odd, or `activation` or `pool` is unknown.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers.big_bigan import LatentHead
        >>> encoder = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), LatentHead(32, 16, hidden_features=64))
        >>> latent = encoder(torch.randn(8, 3, 32, 32))
        >>> latent.mean.shape, latent.std.shape, latent.sample().shape
        (torch.Size([8, 16]), torch.Size([8, 16]), torch.Size([8, 16]))
    """

    def __init__(
        self,
        in_features: int,
        latent_dim: int = 120,
        *,
        hidden_features: int = 4096,
        depth: int = 4,
        activation: str = "pre",
        spectral_norm: bool = False,
        pool: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        latent_dim = checks.integer("latent_dim", latent_dim, 1)
        checks.choice("pool", pool, POOLS)
        self.latent_dim, self.spectral_norm, self.pool = latent_dim, spectral_norm, pool
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"depth": depth, "activation": activation, "spectral_norm": spectral_norm}
        self.mlp = ResidualMLP(in_features, hidden_features=hidden_features, **options, **factory)
        self.linear = nn.Linear(self.mlp.out_features, 2 * latent_dim, **factory)
        init_orthogonal_(self.linear, spectral_norm)

    def reset_parameters(self) -> None:
        """Initialize again: orthogonal weights and zero biases."""
        self.mlp.reset_parameters()
        init_orthogonal_(self.linear, self.spectral_norm)

    def extra_repr(self) -> str:
        """Return the arguments that the parts do not show."""
        return f"latent_dim={self.latent_dim}, pool={self.pool!r}"

    def forward(self, features: Tensor) -> Latent:
        """Return the latents' distribution for features (N, C), (N, C, H, W) or (N, T, C), in the parameters' dtype."""
        hidden = self.mlp(pooled("features", features, self.pool, self.mlp.in_features))
        output = self.linear(hidden)
        mean, raw = output.to(parameter_dtype(self.linear, output.dtype)).chunk(2, 1)
        return Latent(mean, F.softplus(raw))
