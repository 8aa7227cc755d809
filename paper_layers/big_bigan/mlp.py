"""A perceptron of residual blocks."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core.fusing import unchanged, unwatched
from paper_layers._core.tracing import Leaf
from paper_layers.big_bigan._init import init_orthogonal_
from paper_layers.big_bigan.spectral import SpectralLinear

ACTIVATIONS = ("pre", "post")
_BLOCK_DEPTH = 2  # Layers in a residual block.


class _Block(nn.Module):
    """Two layers and a skip connection, which is a linear layer if the size changes."""

    def __init__(self, in_features: int, out_features: int, first: bool, activation: str, factory: dict[str, Any]):
        super().__init__()
        self.first, self.activation = first, activation
        self.fc1 = SpectralLinear(in_features, out_features, **factory)
        self.fc2 = SpectralLinear(out_features, out_features, **factory)
        same = in_features == out_features
        self.skip = None if same else SpectralLinear(in_features, out_features, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x) if self.activation == "pre" and not self.first else x
        h = F.relu(self.fc1(h), inplace=_owns_output(self.fc1))
        h, skip = self.fc2(h), x if self.skip is None else self.skip(x)
        h = h.add_(skip) if _owns_output(self.fc2) else h + skip
        return F.relu_(h) if self.activation == "post" else h


def _owns_output(layer: nn.Module) -> bool:
    """Return whether the layer's output may be overwritten: neither autograd nor a hook needs it."""
    return unwatched(layer) and unchanged(SpectralLinear) and type(layer).forward is SpectralLinear.forward


class ResidualMLP(Leaf):
    r"""A perceptron of residual blocks of two layers: H, J and the encoder's head of BigBiGAN.

    .. math:: x_{i+1} = S x_i + W_2 \, \mathrm{relu}(W_1 \, \mathrm{relu}(x_i) + b_1) + b_2

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019. The paper does not specify the
    position of the activations, nor the skip connection where the size changes. Here S is a matrix if the size changes
    and the identity otherwise. With "pre", as in BigGAN's blocks, activations come before the matrix products, except
    on the input, and once more at the end. With "post", as in the first ResNet, they come after the sum.

    Args:
        in_features: Size of the input.
        hidden_features: Size of all layers and of the output.
        depth: Number of layers, even; with 0 the output is the input.
        activation: "pre" or "post".
        spectral_norm: Give all weights spectral norm 1, by `torch.nn.utils.parametrizations.spectral_norm`.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is too small, `depth` is odd or `activation` is unknown.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import ResidualMLP
        >>> ResidualMLP(120, hidden_features=64, depth=4)(torch.randn(8, 120)).shape
        torch.Size([8, 64])
    """

    def __init__(
        self,
        in_features: int,
        *,
        hidden_features: int = 2048,
        depth: int = 8,
        activation: str = "pre",
        spectral_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        in_features, hidden_features = checks.positive(in_features=in_features, hidden_features=hidden_features)
        depth = checks.integer("depth", depth, 0)
        if depth % _BLOCK_DEPTH:
            raise ValueError(f"depth: expected an even number, as blocks have two layers, got {depth}")
        checks.choice("activation", activation, ACTIVATIONS)
        self.in_features, self.hidden_features, self.depth = in_features, hidden_features, depth
        self.activation, self.spectral_norm = activation, spectral_norm
        self.out_features = hidden_features if depth else in_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = [in_features] + [hidden_features] * (depth // _BLOCK_DEPTH)
        self.blocks = nn.Sequential(
            *(_Block(size, hidden_features, i == 0, activation, factory) for i, size in enumerate(sizes[:-1]))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize again: orthogonal weights, as in BigGAN, and zero biases."""
        for block in self.blocks:
            for layer in block.children():
                init_orthogonal_(cast(nn.Linear, layer), self.spectral_norm)

    def extra_repr(self) -> str:
        """Return all arguments."""
        return (
            f"{self.in_features}, hidden_features={self.hidden_features}, depth={self.depth}, "
            f"activation={self.activation!r}, spectral_norm={self.spectral_norm}"
        )

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, in_features) to (N, out_features)."""
        checks.features("input", input, self.in_features)
        output = self.blocks(input)
        return F.relu(output) if self.activation == "pre" and self.depth else output
