"""A perceptron of residual blocks, and how its layers start."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as normalize

from paper_layers._core import checks
from paper_layers._core.fusing import unchanged, unwatched
from paper_layers._core.tracing import Leaf
from paper_layers.big_bigan.spectral import SpectralLinear

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


class _Block(nn.Module):
    """Two layers and a skip, which is a product where the width changes."""

    def __init__(self, in_features: int, width: int, first: bool, activation: str, factory: dict[str, Any]):
        super().__init__()
        self.first, self.activation = first, activation
        self.fc1 = SpectralLinear(in_features, width, **factory)
        self.fc2 = SpectralLinear(width, width, **factory)
        self.skip = SpectralLinear(in_features, width, bias=False, **factory) if in_features != width else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x) if self.activation == "pre" and not self.first else x
        h = F.relu(self.fc1(h), inplace=_owns_output(self.fc1))
        h, skip = self.fc2(h), x if self.skip is None else self.skip(x)
        h = h.add_(skip) if _owns_output(self.fc2) else h + skip
        return F.relu_(h) if self.activation == "post" else h


def _owns_output(layer: nn.Module) -> bool:
    """Return True where the layer's output may be overwritten: a product that neither autograd nor a hook needs."""
    return unwatched(layer) and unchanged(SpectralLinear) and type(layer).forward is SpectralLinear.forward


class ResidualMLP(Leaf):
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
        in_features = checks.integer("in_features", in_features, 1)
        width = checks.integer("width", width, 1)
        depth = checks.integer("depth", depth, 0)
        if depth % _LAYERS:
            raise ValueError(f"depth: expected an even number, as blocks have two layers, got {depth}")
        checks.choice("activation", activation, ACTIVATIONS)
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
        checks.features("input", input, self.in_features)
        output = self.blocks(input)
        return F.relu(output) if self.activation == "pre" and self.depth else output
