"""Search for dilated nearest neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paper_layers._core import checks
from paper_layers._core.tracing import Leaf
from paper_layers.ops.knn import METRICS, knn


class DilatedKNN(Leaf):
    r"""The dilated nearest neighbours of each point.

    .. math:: \mathcal{N}^{(d)}(v) = \{u_1, u_{1+d}, u_{1+2d}, \ldots, u_{1+(k-1)d}\}

    Section 3.3 of Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as CNNs?", ICCV 2019. In training and with
    `stochastic_probability`, stochastic dilation takes k of the ``k * dilation`` nearest at random, at the same
    positions for all points, as the official code does.

    Args:
        k: Neighbours of each point.
        dilation: d in the equation.
        stochastic: Sometimes take random neighbours in training.
        stochastic_probability: The probability of random neighbours.
        metric: The metric of `paper_layers.knn`.
        include_self: Count each point as its own first neighbour.

    Raises:
        TypeError: k or dilation is not an int.
        ValueError: A value is out of range or unknown.

    Example:
        >>> import torch
        >>> from paper_layers.deep_gcn import DilatedKNN
        >>> DilatedKNN(k=16, dilation=4)(torch.randn(2, 1024, 3)).shape
        torch.Size([2, 1024, 16])
    """

    def __init__(
        self,
        k: int = 16,
        dilation: int = 1,
        *,
        stochastic: bool = False,
        stochastic_probability: float = 0.2,
        metric: str = "sqeuclidean",
        include_self: bool = True,
    ):
        super().__init__()
        k = checks.integer("k", k, 1)
        dilation = checks.integer("dilation", dilation, 1)
        stochastic_probability = checks.probability("stochastic_probability", stochastic_probability)
        checks.choice("metric", metric, METRICS)
        self.k, self.dilation = k, dilation
        self.stochastic, self.stochastic_probability = stochastic, stochastic_probability
        self.metric, self.include_self = metric, include_self

    def extra_repr(self) -> str:
        """Return all arguments."""
        names = ("k", "dilation", "stochastic", "stochastic_probability", "metric", "include_self")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(self, x: Tensor, batch: Tensor | None = None, ptr: Tensor | None = None) -> Tensor:
        """Return the neighbours, of shape (B, N, k) or (N, k) as in `paper_layers.knn`; -1 where there are too few."""
        positions: Tensor | None = None
        if self.training and self.stochastic and self.dilation > 1:
            draw_random = torch.rand(()) < self.stochastic_probability
            positions = torch.randperm(self.k * self.dilation)[: self.k]
            if torch.compiler.is_compiling():  # One graph for both.
                positions = positions.where(draw_random, torch.arange(0, self.k * self.dilation, self.dilation))
            elif not draw_random:
                positions = None
        positions = None if positions is None else positions.sort().values.to(x.device)
        options: dict[str, Any] = {"metric": self.metric, "include_self": self.include_self, "batch": batch, "ptr": ptr}
        return knn(x.detach(), k=self.k, dilation=self.dilation, positions=positions, **options)[0]
