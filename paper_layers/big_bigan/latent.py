"""The encoder's head: a normal distribution of latents for each image."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core.fusing import parameter_dtype
from paper_layers._core.tracing import Leaf
from paper_layers.big_bigan.mlp import ResidualMLP, start
from paper_layers.big_bigan.named_tuples import exported
from paper_layers.big_bigan.pooling import POOLS, pooled


@exported
class Latent(NamedTuple):
    """A normal distribution of latents: mean and standard deviation, of shape (N, latent_dim) each."""

    mean: Tensor
    std: Tensor

    def sample(self) -> Tensor:
        """One latent of each, by torch's random state; gradients go to mean and std."""
        return torch.addcmul(self.mean, self.std, torch.randn_like(self.std))


class LatentHead(Leaf):
    r"""Turn an image network into BigBiGAN's stochastic encoder: latents from its features.

    .. math:: z = \mu + \mathrm{softplus}(\hat\sigma) \, \epsilon, \quad \epsilon \sim N(0, I)

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019: average pool, residual MLP,
    one linear layer that gives :math:`\mu` and :math:`\hat\sigma`; no KL term. The pair that the discriminator sees
    has a sample, not the mean.

    Args:
        in_features: Channels C of the features.
        latent_dim: Size of the latent.
        width: Of the MLP.
        depth: Its layers, an even number; 0 for none.
        activation: "pre" or "post", as in `ResidualMLP`; not documented in the paper.
        spectral_norm: Of all weights; not documented for the encoder.
        pool: "average" over places, or "sum".
        device: Where the parameters are.
        dtype: Their dtype.

    Raises:
        TypeError: A number is no int.
        ValueError: A number is too small, `depth` odd, `activation` or `pool` unknown.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers.big_bigan import LatentHead
        >>> encoder = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), LatentHead(32, 16, width=64))
        >>> latent = encoder(torch.randn(8, 3, 32, 32))
        >>> latent.mean.shape, latent.std.shape, latent.sample().shape
        (torch.Size([8, 16]), torch.Size([8, 16]), torch.Size([8, 16]))
    """

    def __init__(
        self,
        in_features: int,
        latent_dim: int = 120,
        width: int = 4096,
        depth: int = 4,
        activation: str = "pre",
        spectral_norm: bool = False,
        pool: str = "average",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        latent_dim = checks.integer("latent_dim", latent_dim, 1)
        checks.choice("pool", pool, POOLS)
        self.latent_dim, self.spectral_norm, self.pool = latent_dim, spectral_norm, pool
        self.mlp = ResidualMLP(in_features, width, depth, activation, spectral_norm, device, dtype)
        self.linear = nn.Linear(self.mlp.out_features, 2 * latent_dim, device=device, dtype=dtype)
        start(self.linear, spectral_norm)

    def reset_parameters(self) -> None:
        """Start again: orthogonal weights and zero biases."""
        self.mlp.reset_parameters()
        start(self.linear, self.spectral_norm)

    def extra_repr(self) -> str:
        """What the parts do not show."""
        return f"latent_dim={self.latent_dim}, pool={self.pool!r}"

    def forward(self, features: Tensor) -> Latent:
        """The distribution of latents for features (N, C), (N, C, H, W) or (N, T, C), in the parameters' dtype."""
        hidden = self.mlp(pooled("features", features, self.pool, self.mlp.in_features, "in_features"))
        output = self.linear(hidden)
        mean, raw = output.to(parameter_dtype(self.linear, output.dtype)).chunk(2, 1)
        return Latent(mean, F.softplus(raw))
