"""Graphs of dilated neighbours as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paper_layers._core import checks
from paper_layers._core.tracing import Leaf
from paper_layers.ops.knn import METRICS, knn


class DilatedKNN(Leaf):
    r"""The graph of each point's dilated nearest neighbours.

    .. math:: \mathcal{N}^{(d)}(v) = \{u_1, u_{1+d}, u_{1+2d}, \ldots, u_{1+(k-1)d}\}

    Section 3.3 of Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as CNNs?", ICCV 2019. Stochastic dilation
    keeps, in training and with probability `epsilon`, k of the ``k * dilation`` ranks at random, the same for all
    points, as the official code does.

    Args:
        k: Neighbours of each point.
        dilation: d in the equation.
        stochastic: Whether the ranks are sometimes random in training.
        epsilon: How often.
        metric: As in `paper_layers.knn`.
        include_self: Whether a point is its own first neighbour.

    Raises:
        TypeError: k or dilation is no int.
        ValueError: A value does not fit.

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
        epsilon: float = 0.2,
        metric: str = "sqeuclidean",
        include_self: bool = True,
    ):
        super().__init__()
        k = checks.integer("k", k, 1)
        dilation = checks.integer("dilation", dilation, 1)
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon: expected a probability, got {epsilon}")
        checks.choice("metric", metric, METRICS)
        self.k, self.dilation, self.stochastic, self.epsilon = k, dilation, stochastic, epsilon
        self.metric, self.include_self = metric, include_self

    def extra_repr(self) -> str:
        """All arguments."""
        return (
            f"k={self.k}, dilation={self.dilation}, stochastic={self.stochastic}, epsilon={self.epsilon}, "
            f"metric={self.metric!r}, include_self={self.include_self}"
        )

    def forward(self, x: Tensor, batch: Tensor | None = None, ptr: Tensor | None = None) -> Tensor:
        """Find the neighbours, of shape (B, N, k) or (N, k) as in `paper_layers.knn`; -1 where there are too few."""
        x = x.detach()
        clouds: dict[str, Any] = {"batch": batch, "ptr": ptr, "metric": self.metric, "include_self": self.include_self}
        if not self.training or not self.stochastic or self.dilation == 1:
            return knn(x, k=self.k, dilation=self.dilation, **clouds)[0]
        often = torch.rand(()) < self.epsilon
        random = torch.randperm(self.k * self.dilation)[: self.k]
        if torch.compiler.is_compiling():  # one graph for both
            columns = torch.where(often, random, torch.arange(0, self.k * self.dilation, self.dilation))
        elif often:
            columns = random
        else:
            return knn(x, k=self.k, dilation=self.dilation, **clouds)[0]
        ranks = columns.sort().values.to(x.device)
        return knn(x, k=self.k, dilation=self.dilation, ranks=ranks, **clouds)[0]
