"""Heads of the discriminator, which score features, latents, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paper_layers._core import checks, values
from paper_layers._core.autocast import without_autocast
from paper_layers._core.fusing import parameter_dtype
from paper_layers._core.tracing import Leaf
from paper_layers.big_bigan._init import init_orthogonal_
from paper_layers.big_bigan.mlp import ResidualMLP

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from paper_layers.big_bigan._options import HeadOptions, MLPOptions


class ProjectionScore(Leaf):
    r"""Project each feature vector to one number, in float32 also under autocast.

    .. math:: s = \theta \cdot h + b + e_y \cdot h

    The scores of Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019. The paper does not
    say whether they have a bias and a spectral norm. The last term is the class projection of Miyato, Koyama, "cGANs
    with Projection Discriminator", ICLR 2018, for labels y.

    Args:
        in_features: Size of the features h.
        num_classes: Number of classes; None (as in the paper) for no class projection.
        bias: Add b.
        spectral_norm: Give :math:`\theta`, and the matrix of all :math:`e_y`, spectral norm 1.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import ProjectionScore
        >>> ProjectionScore(16)(torch.randn(8, 16)).shape
        torch.Size([8])
    """

    def __init__(
        self,
        in_features: int,
        *,
        num_classes: int | None = None,
        bias: bool = True,
        spectral_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        in_features = checks.integer("in_features", in_features, 1)
        if num_classes is not None:
            num_classes = checks.integer("num_classes", num_classes, 1)
        self.in_features, self.num_classes, self.spectral_norm = in_features, num_classes, spectral_norm
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.projection = nn.Linear(in_features, 1, bias=bias, **factory)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, in_features, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize again: orthogonal weights and zero bias."""
        init_orthogonal_(self.projection, self.spectral_norm)
        if self.classes is not None:
            init_orthogonal_(self.classes, self.spectral_norm)

    def extra_repr(self) -> str:
        """Return the arguments that the layers do not show."""
        return f"{self.in_features}, num_classes={self.num_classes}, spectral_norm={self.spectral_norm}"

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Score features (N, in_features), with int64 labels (N,) if there are classes; return (N,)."""
        checks.features("features", features, self.in_features)
        if labels is not None and self.num_classes is None:
            raise ValueError("labels: expected None without num_classes, got labels")
        if labels is None and self.num_classes is not None:
            raise ValueError(f"labels: expected a label of {self.num_classes} classes for each row, got None")
        with without_autocast(features.device.type):
            features = features.to(parameter_dtype(self.projection, torch.promote_types(features.dtype, torch.float32)))
            score = self.projection(features).squeeze(1)
            if self.classes is not None and labels is not None:
                labels = values.integers("labels", labels, features.shape[0])
                score = score + (self.classes(labels) * features).sum(1)
            return score.float() if score.dtype in (torch.bfloat16, torch.float16) else score


class _Head(Leaf):
    """A residual MLP, and a projection of its output."""

    def __init__(
        self,
        in_features: int,
        *,
        num_classes: int | None = None,
        projection_bias: bool = True,
        projection_spectral_norm: bool = True,
        scored: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[MLPOptions],
    ):
        super().__init__()
        self.mlp = ResidualMLP(in_features, device=device, dtype=dtype, **options)
        projection: dict[str, Any] = {"bias": projection_bias, "spectral_norm": projection_spectral_norm}
        projection |= {"num_classes": num_classes, "device": device, "dtype": dtype}
        self.score = ProjectionScore(self.mlp.out_features, **projection) if scored else None

    def reset_parameters(self) -> None:
        """Initialize the MLP and the projection again."""
        self.mlp.reset_parameters()
        if self.score is not None:
            self.score.reset_parameters()


class UnaryHead(_Head):
    r"""Score one half of a pair with a residual MLP and a projection: BigBiGAN's H, on the latent.

    :math:`s_z = \theta_z \cdot H(z)` of Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS
    2019. With ``depth=0`` it is the projection alone, as on the image's features: :math:`s_x = \theta_x \cdot F(x)`.

    Args:
        in_features: Size of the input.
        num_classes: Number of classes, as in `ProjectionScore`.
        projection_bias: Give the projection a bias.
        projection_spectral_norm: Give the projection spectral norm 1.
        scored: If False, there is no projection and the score is None.
        **options: `hidden_features`, `depth`, `activation`, `spectral_norm`: see `ResidualMLP`.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import UnaryHead
        >>> hidden, score = UnaryHead(120, hidden_features=64)(torch.randn(8, 120))
        >>> hidden.shape, score.shape
        (torch.Size([8, 64]), torch.Size([8]))
    """

    def forward(self, input: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the hidden features (N, out_features) of the input (N, in_features), and their scores (N,)."""
        hidden = self.mlp(input)
        return hidden, None if self.score is None else self.score(hidden, labels)


class JointHead(_Head):
    r"""Score pairs with a residual MLP and a projection: BigBiGAN's J, on features of the image and of the latent.

    :math:`s_{xz} = \theta_{xz} \cdot J(F(x), H(z))` of Donahue, Simonyan, "Large Scale Adversarial Representation
    Learning", NeurIPS 2019.

    Args:
        in_features: Size of the image's features F(x).
        latent_features: Size of the latent's features H(z).
        num_classes: Number of classes, as in `ProjectionScore`.
        **options: `hidden_features`, `depth`, `activation`, `spectral_norm`, `projection_bias`,
            `projection_spectral_norm`: see `UnaryHead`.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import JointHead
        >>> JointHead(32, 64, hidden_features=64)(torch.randn(8, 32), torch.randn(8, 64)).shape
        torch.Size([8])
    """

    score: ProjectionScore

    def __init__(
        self,
        in_features: int,
        latent_features: int,
        *,
        num_classes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[HeadOptions],
    ):
        sizes = checks.positive(in_features=in_features, latent_features=latent_features)
        super().__init__(sum(sizes), num_classes=num_classes, device=device, dtype=dtype, **options)
        self.in_features, self.latent_features = sizes

    def extra_repr(self) -> str:
        """Return the arguments that the layers do not show."""
        return f"{self.in_features}, {self.latent_features}"

    def forward(self, features: Tensor, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Score features (N, in_features) with hidden features (N, latent_features), and labels if there are classes.

        Returns:
            Scores (N,).
        """
        checks.features("features", features, self.in_features)
        checks.floating("hidden", hidden)
        checks.shape("hidden", hidden, (features.shape[0], self.latent_features))
        return self.score(self.mlp(torch.cat([features, hidden], 1)), labels)
