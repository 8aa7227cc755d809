"""The perceptrons of the discriminator: residual blocks, and what makes one score of their output."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as normalize

from paper_layers.big_bigan.spectral import SpectralLinear, without_autocast
from paper_layers.ops import _checks

ACTIVATIONS = ("pre", "post")
_LAYERS = 2  # Of a residual block.


def start(layer: nn.Linear | nn.Embedding, spectral_norm: bool) -> None:
    """Orthogonal weight, zero bias and, if wanted, a fresh power iteration. Parameters stay the same objects."""
    if parametrize.is_parametrized(layer, "weight"):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    if not layer.weight.is_meta:
        wide = torch.promote_types(layer.weight.dtype, torch.float32)  # QR has no half types.
        with torch.no_grad():
            layer.weight.copy_(nn.init.orthogonal_(torch.empty_like(layer.weight, dtype=wide)))
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
    if spectral_norm:
        normalize(layer)


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of a few strings."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def rows(name: str, value: Tensor, features: int, size_name: str) -> None:
    """A floating tensor of shape (N, features)."""
    _checks.floating(name, value)
    if value.dim() != 2 or value.shape[1] != features:
        raise ValueError(f"{name}: expected shape (N, {features}), as {size_name} says, got {tuple(value.shape)}")


class _Block(nn.Module):
    """Two layers and a skip, which is a product where the width changes."""

    def __init__(self, in_features: int, width: int, first: bool, activation: str, factory: dict[str, Any]):
        super().__init__()
        self.first, self.activation = first, activation
        self.fc1 = SpectralLinear(in_features, width, **factory)
        self.fc2 = SpectralLinear(width, width, **factory)
        self.skip = SpectralLinear(in_features, width, bias=False, **factory) if in_features != width else None

    def forward(self, x: Tensor) -> Tensor:
        # In place wherever the tensor is a product, which autograd does not need again.
        h = F.relu(x) if self.activation == "pre" and not self.first else x
        h = self.fc2(F.relu_(self.fc1(h))).add_(x if self.skip is None else self.skip(x))
        return F.relu_(h) if self.activation == "post" else h


class ResidualMLP(nn.Module):
    r"""A perceptron of residual blocks of two layers: H, J and the encoder's head of BigBiGAN.

    .. math:: x_{i+1} = S x_i + W_2 \, \mathrm{relu}(W_1 \, \mathrm{relu}(x_i) + b_1) + b_2

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019. The paper does not say where
    the activations stand, nor how the width changes. Here S is a product without bias where it does, and the identity
    elsewhere; activations come before the products ("pre", as in BigGAN's blocks, not on the input itself, and once
    more at the end), or after the sum ("post", as in the first ResNet).

    Args:
        in_features: Size of the input.
        width: Size of all layers and of the output.
        depth: Layers, an even number; with 0 the output is the input.
        activation: "pre" or "post".
        spectral_norm: Whether all weights have spectral norm 1, by `torch.nn.utils.parametrizations`.
        device: Where the parameters are.
        dtype: Their dtype.

    Raises:
        TypeError: A number is no int.
        ValueError: A number is too small, `depth` is odd or `activation` unknown.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import ResidualMLP
        >>> ResidualMLP(120, width=64, depth=4)(torch.randn(8, 120)).shape
        torch.Size([8, 64])
    """

    def __init__(
        self,
        in_features: int,
        width: int = 2048,
        depth: int = 8,
        activation: str = "pre",
        spectral_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _checks.integer("in_features", in_features, 1)
        _checks.integer("width", width, 1)
        _checks.integer("depth", depth, 0)
        if depth % _LAYERS:
            raise ValueError(f"depth: expected an even number, as blocks have two layers, got {depth}")
        choice("activation", activation, ACTIVATIONS)
        self.in_features, self.width, self.depth = in_features, width, depth
        self.activation, self.spectral_norm = activation, spectral_norm
        self.out_features = width if depth else in_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = [in_features] + [width] * (depth // _LAYERS)
        self.blocks = nn.Sequential(
            *(_Block(size, width, i == 0, activation, factory) for i, size in enumerate(sizes[:-1]))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again: orthogonal weights, as in BigGAN, and zero biases."""
        for block in self.blocks:
            for layer in block.children():
                start(cast(nn.Linear, layer), self.spectral_norm)

    def extra_repr(self) -> str:
        """All arguments."""
        return (
            f"{self.in_features}, width={self.width}, depth={self.depth}, activation={self.activation!r}, "
            f"spectral_norm={self.spectral_norm}"
        )

    def forward(self, input: Tensor) -> Tensor:
        """From (N, in_features) to (N, out_features)."""
        rows("input", input, self.in_features, "in_features")
        output = self.blocks(input)
        return F.relu(output) if self.activation == "pre" and self.depth else output


class Score(nn.Module):
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
        _checks.integer("in_features", in_features, 1)
        if num_classes is not None:
            _checks.integer("num_classes", num_classes, 1)
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
        rows("features", features, self.in_features, "in_features")
        if labels is not None and self.num_classes is None:
            raise ValueError("labels: expected None without num_classes, got labels")
        if labels is None and self.num_classes is not None:
            raise ValueError(f"labels: expected a label of {self.num_classes} classes for each row, got None")
        with without_autocast(features.device.type):
            weight = self.projection.weight
            features = features.to(weight.dtype)
            score = F.linear(features, weight, self.projection.bias).squeeze(1)
            if self.classes is not None and labels is not None:
                _checks.int64("labels", labels, features.shape[0])
                score = score + (self.classes(labels) * features).sum(1)
            return score.float() if score.dtype in (torch.bfloat16, torch.float16) else score


class UnaryHead(nn.Module):
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


class JointHead(nn.Module):
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
        _checks.integer("feature_dim", feature_dim, 1)
        _checks.integer("hidden_dim", hidden_dim, 1)
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
        rows("features", features, self.feature_dim, "feature_dim")
        rows("hidden", hidden, self.hidden_dim, "hidden_dim")
        if features.shape[0] != hidden.shape[0]:
            raise ValueError(f"hidden: expected {features.shape[0]} rows, as features has, got {hidden.shape[0]}")
        return self.score(self.mlp(torch.cat([features, hidden], 1)), labels)
