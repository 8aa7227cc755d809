"""The heads of the discriminator: what makes one score of features, of latents, of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core.autocast import without_autocast
from paper_layers._core.fusing import parameter_dtype
from paper_layers._core.tracing import Leaf
from paper_layers.big_bigan.mlp import ResidualMLP, start


class Score(Leaf):
    r"""Project features to one number each, in float32 also under autocast.

    .. math:: s = \theta \cdot h + b + e_y \cdot h

    The scores of Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019, which does not say
    whether they have a bias and a spectral norm. The last summand is the class projection of Miyato, Koyama, "cGANs
    with Projection Discriminator", ICLR 2018, of labels y.

    Args:
        in_features: Size of the features h.
        num_classes: Classes of the labels; None for none, as in the paper.
        bias: Whether there is a b.
        spectral_norm: Of :math:`\theta`, and of the matrix of all :math:`e_y`.
        device: Where the parameters are.
        dtype: Their dtype.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import Score
        >>> Score(16)(torch.randn(8, 16)).shape
        torch.Size([8])
    """

    def __init__(
        self,
        in_features: int,
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
        """Start again: orthogonal weights and zero bias."""
        start(self.projection, self.spectral_norm)
        if self.classes is not None:
            start(self.classes, self.spectral_norm)

    def extra_repr(self) -> str:
        """What the layers do not show."""
        return f"{self.in_features}, num_classes={self.num_classes}, spectral_norm={self.spectral_norm}"

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores (N,) of features (N, in_features), with labels, int64 of shape (N,), if there are classes."""
        checks.features("features", features, self.in_features)
        if labels is not None and self.num_classes is None:
            raise ValueError("labels: expected None without num_classes, got labels")
        if labels is None and self.num_classes is not None:
            raise ValueError(f"labels: expected a label of {self.num_classes} classes for each row, got None")
        with without_autocast(features.device.type):
            features = features.to(parameter_dtype(self.projection, torch.promote_types(features.dtype, torch.float32)))
            score = self.projection(features).squeeze(1)
            if self.classes is not None and labels is not None:
                labels = checks.int64("labels", labels, features.shape[0])
                score = score + (self.classes(labels) * features).sum(1)
            return score.float() if score.dtype in (torch.bfloat16, torch.float16) else score


class UnaryHead(Leaf):
    """Score one half of a pair: a residual MLP and a projection; BigBiGAN's H on the latent.

    :math:`s_z = \\theta_z \\cdot H(z)` of Donahue, Simonyan, "Large Scale Adversarial Representation Learning",
    NeurIPS 2019; `ResidualMLP` and `Score` have the choices that the paper leaves open. With ``depth=0`` it is the
    projection alone, as on the image's features: :math:`s_x = \\theta_x \\cdot F(x)`.

    Args:
        in_features: Size of the input.
        width: Size of the hidden layers.
        depth: Layers of the MLP, an even number.
        activation: "pre" or "post", as in `ResidualMLP`.
        spectral_norm: Of the MLP's weights.
        num_classes: Classes of the labels, as in `Score`.
        projection_bias: Whether the projection has a bias.
        projection_spectral_norm: Whether it has a spectral norm.
        scored: Without it there is no projection, and None in place of the score.
        device: Where the parameters are.
        dtype: Their dtype.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import UnaryHead
        >>> hidden, score = UnaryHead(120, width=64)(torch.randn(8, 120))
        >>> hidden.shape, score.shape
        (torch.Size([8, 64]), torch.Size([8]))
    """

    def __init__(
        self,
        in_features: int,
        width: int = 2048,
        depth: int = 8,
        activation: str = "pre",
        spectral_norm: bool = True,
        num_classes: int | None = None,
        projection_bias: bool = True,
        projection_spectral_norm: bool = True,
        scored: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.mlp = ResidualMLP(in_features, width, depth, activation, spectral_norm, device, dtype)
        features = self.mlp.out_features
        projection = (num_classes, projection_bias, projection_spectral_norm, device, dtype)
        self.score = Score(features, *projection) if scored else None

    def reset_parameters(self) -> None:
        """Start again."""
        self.mlp.reset_parameters()
        if self.score is not None:
            self.score.reset_parameters()

    def forward(self, input: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The hidden features (N, out_features) of the input (N, in_features), and their scores (N,)."""
        hidden = self.mlp(input)
        return hidden, None if self.score is None else self.score(hidden, labels)


class JointHead(Leaf):
    """Score pairs: BigBiGAN's J on the features of the image and those of the latent, and a projection.

    :math:`s_{xz} = \\theta_{xz} \\cdot J(F(x), H(z))` of Donahue, Simonyan, "Large Scale Adversarial Representation
    Learning", NeurIPS 2019.

    Args:
        feature_dim: Size of the image's features F(x).
        hidden_dim: Size of the latent's features H(z).
        width: As in `UnaryHead`, and the other arguments as well.
        depth: As in `UnaryHead`.
        activation: As in `UnaryHead`.
        spectral_norm: As in `UnaryHead`.
        num_classes: As in `UnaryHead`.
        projection_bias: As in `UnaryHead`.
        projection_spectral_norm: As in `UnaryHead`.
        device: Where the parameters are.
        dtype: Their dtype.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import JointHead
        >>> JointHead(32, 64, width=64)(torch.randn(8, 32), torch.randn(8, 64)).shape
        torch.Size([8])
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_dim: int,
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
        hidden_dim = checks.integer("hidden_dim", hidden_dim, 1)
        self.feature_dim, self.hidden_dim = feature_dim, hidden_dim
        self.mlp = ResidualMLP(feature_dim + hidden_dim, width, depth, activation, spectral_norm, device, dtype)
        projection = (num_classes, projection_bias, projection_spectral_norm, device, dtype)
        self.score = Score(self.mlp.out_features, *projection)

    def reset_parameters(self) -> None:
        """Start again."""
        self.mlp.reset_parameters()
        self.score.reset_parameters()

    def extra_repr(self) -> str:
        """What the parts do not show."""
        return f"{self.feature_dim}, {self.hidden_dim}"

    def forward(self, features: Tensor, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores (N,) of features (N, feature_dim) and (N, hidden_dim), with labels if there are classes."""
        checks.features("features", features, self.feature_dim)
        checks.features("hidden", hidden, self.hidden_dim)
        if features.shape[0] != hidden.shape[0]:
            raise ValueError(f"hidden: expected {features.shape[0]} rows, as features has, got {hidden.shape[0]}")
        return self.score(self.mlp(torch.cat([features, hidden], 1)), labels)
