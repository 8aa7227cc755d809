"""A linear layer whose spectral norm costs little more than its matrix product."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from paper_layers._core._torch_private import SpectralNorm
from paper_layers._core.fusing import is_plain, known, readable
from paper_layers.ops.spectral_linear import spectral_linear

_EPS = 1e-12  # The op's, and torch's default.


class SpectralLinear(nn.Linear):
    """A linear layer that makes `torch.nn.utils.parametrizations.spectral_norm` cheap: same numbers, same state dict.

    Torch divides the weight, and differentiates the division, in ten passes over memory of the weight's size, which
    cost a third of the products for a batch of 512 and a width of 2048; see `spectral_linear`. `weight` still gives the
    normalized weight.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer; in training mode after a step of the power iteration."""
        norm = self._norm()
        if norm is None:
            return super().forward(input)
        weight: Any = self.parametrizations.weight  # type: ignore[union-attr]
        return spectral_linear(input, weight.original, self.bias, u=norm._u, v=norm._v, training=norm.training)

    def _norm(self) -> Any:
        """The spectral norm, where it is the weight's only parametrisation and does what the op does."""
        if not parametrize.is_parametrized(self, "weight") or parametrize._cache_enabled:
            return None
        chain: Any = self.parametrizations.weight  # type: ignore[union-attr]
        norm = chain[0]
        plain = len(chain) == 1 and readable(chain, parametrize.ParametrizationList) and readable(norm, SpectralNorm)
        usual = plain and norm.dim == 0 and norm.n_power_iterations == 1 and norm.eps == _EPS
        return norm if usual and is_plain(chain.original) else None


known(SpectralLinear, parametrize.ParametrizationList, SpectralNorm)
