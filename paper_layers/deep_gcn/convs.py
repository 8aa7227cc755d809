"""Graph convolutions on tables of neighbours or on PyG's edges."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core.tracing import Leaf
from paper_layers.deep_gcn._clouds import ptr_of
from paper_layers.deep_gcn._each_edge import dropout_channels, edge_outputs, reduce_each_edge, sort_by_cloud
from paper_layers.deep_gcn._edge_linear import edge_linear, pair_linear
from paper_layers.deep_gcn._edge_norm import edge_max
from paper_layers.deep_gcn.edges import check_nodes
from paper_layers.deep_gcn.perceptron import LayerOptions, Perceptron, call_perceptron, may_fuse_edges, may_split_linear
from paper_layers.ops.neighbor_reduce import neighbor_reduce

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _GraphConv(Leaf, abc.ABC):
    """Base of the convolutions: check the arguments, then take the path for the form of the graph."""

    in_channels: int
    out_channels: int

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        *,
        edge_index: Tensor | None = None,
        batch: Tensor | None = None,
        ptr: Tensor | None = None,
    ) -> Tensor:
        """Convolve the features of each node with the features of its neighbours.

        Args:
            x: Features of shape (N, C) or (B, N, C).
            index: Neighbours from `paper_layers.knn`, int64 of shape (N, k) or (B, N, k); -1 is no neighbour.
            edge_index: In place of `index`, for (N, C): edges as in PyG, int64 of shape (2, E), from sources (row 0)
                to targets (row 1). Needs torch_geometric.
            batch: For (N, C): the cloud of each row, ascending, of shape (N,). Instance norm and dropout are per cloud.
            ptr: In place of `batch`: where each cloud starts, of shape (B + 1,).

        Returns:
            Features of shape (N, out_channels) or (B, N, out_channels).

        Raises:
            ImportError: `edge_index` is given and torch_geometric is not installed.
            TypeError: An argument has the wrong type or dtype.
            ValueError: Both `index` and `edge_index` are given, or neither, or a shape or a cloud is wrong.
        """
        checks.floating("x", x)
        checks.shape("x", x, ("N", self.in_channels), ("B", "N", self.in_channels))
        ptr = ptr_of(x, batch, ptr)
        if (index is None) == (edge_index is None):
            raise ValueError(f"index: expected either index or edge_index, got {'none' if index is None else 'both'}")
        if edge_index is None:
            assert index is not None
            return self._on_table(x, index, ptr)
        if not isinstance(edge_index, Tensor):
            raise TypeError(f"edge_index: expected a Tensor, got {type(edge_index).__name__}")
        checks.shape("edge_index", edge_index, (2, "E"))
        if x.dim() != 2:
            raise ValueError(f"x: expected shape (N, C) with edge_index, got {tuple(x.shape)}")
        if edge_index.is_cpu:  # On other devices index_select checks, without a wait.
            check_nodes(edge_index, len(x))
        return self._on_edges(x, edge_index, ptr)

    @abc.abstractmethod
    def _on_table(self, x: Tensor, index: Tensor, ptr: Tensor | None) -> Tensor: ...

    @abc.abstractmethod
    def _on_edges(self, x: Tensor, edge_index: Tensor, ptr: Tensor | None) -> Tensor: ...


def _checked_table(index: Tensor, x: Tensor) -> Tensor:
    """Return the neighbours of each node as int64."""
    index = checks.neighbors("index", index, *x.shape[:-1])
    checks.same_device("index", index, "x", x)
    return index


def _on_pair(layer: nn.Module, x: Tensor, other: Tensor, ptr: Tensor | None) -> Tensor:
    """Run the perceptron on the concatenation of x and `other`."""
    if not may_split_linear(layer):
        return call_perceptron(layer, torch.cat([x, other], -1), ptr)
    return layer.finish(pair_linear(x.flatten(0, -2), other.flatten(0, -2), layer.linear), x, ptr)


def _scatter(values: Tensor, target: Tensor, nodes: int, reduction: str) -> Tensor:
    """Reduce the edges of each target as PyG does; 0 without edges."""
    from torch_geometric.utils import scatter

    return scatter(values, target, 0, nodes, reduction)


class _PerceptronConv(_GraphConv):
    """A convolution with one perceptron."""

    _inputs: ClassVar[int] = 2  # Inputs of the perceptron for each input of the convolution.

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float = 0.0,
        **options: Unpack[LayerOptions],
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.nn = Perceptron(self._inputs * in_channels, out_channels, dropout=dropout, **options)

    def reset_parameters(self) -> None:
        """Initialise all parameters again, as in the official code."""
        self.nn.reset_parameters()


class EdgeConv(_PerceptronConv):
    r"""Edge convolution: the maximum of a perceptron over each node's edges.

    .. math:: x_i' = \max_{j \in \mathcal{N}(i)} h([x_i, x_j - x_i])

    The convolution of ResGCN in Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as CNNs?", ICCV 2019,
    section 3.4, after Wang et al., "Dynamic Graph CNN for Learning on Point Clouds", 2019. The linear layer runs on
    nodes, not on edges, so it costs k times less than the formula. No edge is stored, forward or backward. Nodes
    without neighbours get 0.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        dropout: The probability that a channel is dropped.
        **options: act, norm (over all edges), bias, order, device and dtype of `Perceptron`.

    Example:
        >>> import torch, paper_layers
        >>> from paper_layers.deep_gcn import EdgeConv
        >>> x = torch.randn(2, 1024, 64)
        >>> index, _ = paper_layers.knn(x, k=16)
        >>> EdgeConv(64, 32)(x, index).shape
        torch.Size([2, 1024, 32])
    """

    def _on_table(self, x: Tensor, index: Tensor, ptr: Tensor | None) -> Tensor:
        if may_fuse_edges(self.nn):
            index = _checked_table(index, x)
            output = edge_max(*edge_linear(x.flatten(0, -2), self.nn.linear), index, self.nn.act_norm, ptr)
        else:
            output = reduce_each_edge(self.nn, x, index, ptr, "max", self._edge)
        return dropout_channels(self.nn, output, ptr)

    def _on_edges(self, x: Tensor, edge_index: Tensor, ptr: Tensor | None) -> Tensor:
        order, edge_ptr = sort_by_cloud(edge_index[1], ptr)
        source, target = edge_index[:, order]
        if may_split_linear(self.nn):
            center, neighbor = edge_linear(x, self.nn.linear)
            edges = self.nn.activate_and_normalize(
                center.index_select(0, target) + neighbor.index_select(0, source), edge_ptr
            )
        else:
            edges = edge_outputs(self.nn, self._edge(x.index_select(0, target), x.index_select(0, source)), edge_ptr)
        return dropout_channels(self.nn, _scatter(edges, target, len(x), "max"), ptr)

    def _edge(self, center: Tensor, neighbor: Tensor) -> Tensor:
        return torch.cat([center, neighbor - center], -1)


class MRConv(_PerceptronConv):
    r"""Max-relative graph convolution: a perceptron on each node and its largest difference to a neighbour.

    .. math:: x_i' = h([x_i, \max_{j \in \mathcal{N}(i)} (x_j - x_i)])

    Equation 4 of Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as CNNs?", ICCV 2019. The largest
    difference of a node without neighbours is 0.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        dropout: The probability that a channel is dropped.
        **options: act, norm (over all nodes), bias, order, device and dtype of `Perceptron`.

    Example:
        >>> import torch, paper_layers
        >>> from paper_layers.deep_gcn import MRConv
        >>> x = torch.randn(2, 1024, 64)
        >>> index, _ = paper_layers.knn(x, k=16)
        >>> MRConv(64, 32)(x, index).shape
        torch.Size([2, 1024, 32])
    """

    def _on_table(self, x: Tensor, index: Tensor, ptr: Tensor | None) -> Tensor:
        return self._combine(x, neighbor_reduce(x, index, "max", relative=True), ptr)

    def _on_edges(self, x: Tensor, edge_index: Tensor, ptr: Tensor | None) -> Tensor:
        source, target = edge_index
        return self._combine(
            x, _scatter(x.index_select(0, source) - x.index_select(0, target), target, len(x), "max"), ptr
        )

    def _combine(self, x: Tensor, relative: Tensor, ptr: Tensor | None) -> Tensor:
        return _on_pair(self.nn, x, relative, ptr)


class GINConv(_PerceptronConv):
    r"""Graph isomorphism convolution: a perceptron on each node plus the sum of its neighbours.

    .. math:: x_i' = h((1 + \epsilon) x_i + \sum_{j \in \mathcal{N}(i)} x_j)

    Equation 4.1 of Xu, Hu, Leskovec, Jegelka, "How Powerful are Graph Neural Networks?", ICLR 2019, as in the official
    code of Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as CNNs?", ICCV 2019. :math:`\epsilon` is
    learned.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        dropout: The probability that a channel is dropped.
        **options: act, norm (over all nodes), bias, order, device and dtype of `Perceptron`.

    Example:
        >>> import torch, paper_layers
        >>> from paper_layers.deep_gcn import GINConv
        >>> x = torch.randn(2, 1024, 64)
        >>> index, _ = paper_layers.knn(x, k=16)
        >>> GINConv(64, 32)(x, index).shape
        torch.Size([2, 1024, 32])
    """

    _inputs = 1

    def __init__(self, in_channels: int, out_channels: int, *, dropout: float = 0.0, **options: Unpack[LayerOptions]):
        super().__init__(in_channels, out_channels, dropout=dropout, **options)
        self.eps = nn.Parameter(self.nn.linear.weight.new_zeros(1))

    def reset_parameters(self) -> None:
        """Initialise all parameters again, as in the official code."""
        super().reset_parameters()
        nn.init.zeros_(self.eps)

    def _on_table(self, x: Tensor, index: Tensor, ptr: Tensor | None) -> Tensor:
        return self._combine(x, neighbor_reduce(x, index, "sum"), ptr)

    def _on_edges(self, x: Tensor, edge_index: Tensor, ptr: Tensor | None) -> Tensor:
        source, target = edge_index
        return self._combine(x, _scatter(x.index_select(0, source), target, len(x), "sum"), ptr)

    def _combine(self, x: Tensor, total: Tensor, ptr: Tensor | None) -> Tensor:
        return call_perceptron(self.nn, (1 + self.eps) * x + total, ptr)


class SAGEConv(_GraphConv):
    r"""GraphSAGE: a perceptron on each node and the maximum or mean of its transformed neighbours.

    .. math:: x_i' = h_2([x_i, \max_{j \in \mathcal{N}(i)} h_1(x_j)]) \quad \text{or} \quad
              x_i' = \frac{h_2([x_i, m_i]) + b}{\lVert h_2([x_i, m_i]) + b \rVert}, \;
              m_i = \operatorname{mean}_{j \in \mathcal{N}(i) \cup \{i\}} W x_j

    Hamilton, Ying, Leskovec, "Inductive Representation Learning on Large Graphs", NeurIPS 2017, in the two forms of the
    official code of Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as CNNs?", ICCV 2019: the maximum of the
    dense code, and the mean of the sparse code, whose output has length one unless `norm` is None.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        reduction: "max" or "mean".
        relative: With "mean", take the mean of the differences :math:`x_j - x_i`.
        dropout: The probability that a channel is dropped.
        **options: act, norm (over all nodes, in :math:`h_1` over all edges), bias (also b), order, device and dtype of
            `Perceptron`.

    Raises:
        ValueError: `reduction` is unknown, or `relative` is True with "max".

    Example:
        >>> import torch, paper_layers
        >>> from paper_layers.deep_gcn import SAGEConv
        >>> x = torch.randn(2, 1024, 64)
        >>> index, _ = paper_layers.knn(x, k=16)
        >>> SAGEConv(64, 32)(x, index).shape
        torch.Size([2, 1024, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        reduction: Literal["max", "mean"] = "max",
        relative: bool = False,
        dropout: float = 0.0,
        **options: Unpack[LayerOptions],
    ):
        super().__init__()
        checks.choice("reduction", reduction, ("max", "mean"))
        if relative and reduction == "max":
            raise ValueError("relative: expected False with reduction='max', got True")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.reduction, self.relative = reduction, relative
        self.normalize = reduction == "mean" and options.get("norm", "batch") is not None
        linear: LayerOptions = {**options, "act": None, "norm": None, "bias": False}
        if reduction == "max":
            self.nn1 = Perceptron(in_channels, in_channels, **options)
        else:
            self.nn1 = Perceptron(in_channels, out_channels, **linear)
        self.nn2 = Perceptron(in_channels + self.nn1.linear.out_features, out_channels, dropout=dropout, **options)
        bias = self.nn2.linear.bias if reduction == "mean" else None
        self.bias = None if bias is None else nn.Parameter(torch.zeros_like(bias))

    def reset_parameters(self) -> None:
        """Initialise all parameters again, as in the official code."""
        self.nn1.reset_parameters()
        self.nn2.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Return the options of the reduction."""
        return f"reduction={self.reduction!r}, relative={self.relative}"

    def _on_table(self, x: Tensor, index: Tensor, ptr: Tensor | None) -> Tensor:
        if self.reduction == "mean":  # Every node is its own neighbour exactly once.
            own = torch.arange(x.shape[-2], device=x.device)[:, None].expand(*x.shape[:-1], 1)
            index = torch.cat([own, torch.where(index == own, -1, index)], -1)
            if self._mean_before_linear:
                return self._combine(x, self._mean(x, neighbor_reduce(x, index, "mean")), ptr)
        elif may_fuse_edges(self.nn1):
            index, terms = _checked_table(index, x), self.nn1.linear(x.flatten(0, -2))
            largest = edge_max(torch.zeros_like(terms), terms, index, self.nn1.act_norm, ptr)
            return self._combine(x, largest, ptr)
        return self._combine(x, reduce_each_edge(self.nn1, x, index, ptr, self.reduction, self._edge), ptr)

    def _on_edges(self, x: Tensor, edge_index: Tensor, ptr: Tensor | None) -> Tensor:
        if self.reduction == "mean":
            own = torch.arange(len(x), device=x.device).expand(2, -1)
            edge_index = torch.cat([edge_index[:, edge_index[0] != edge_index[1]], own], 1)
            if self._mean_before_linear:
                source, target = edge_index
                return self._combine(x, self._mean(x, _scatter(x.index_select(0, source), target, len(x), "mean")), ptr)
        order, edge_ptr = sort_by_cloud(edge_index[1], ptr)
        source, target = edge_index[:, order]
        if self.reduction == "max" and may_split_linear(self.nn1):
            edges = self.nn1.activate_and_normalize(self.nn1.linear(x).index_select(0, source), edge_ptr)
        else:
            edges = edge_outputs(self.nn1, self._edge(x.index_select(0, target), x.index_select(0, source)), edge_ptr)
        return self._combine(x, _scatter(edges, target, len(x), self.reduction), ptr)

    @property
    def _mean_before_linear(self) -> bool:
        """True where the linear layer may run on the mean in place of each neighbour."""
        layer = self.nn1
        return may_split_linear(layer) and layer.act is None and layer.norm is None

    def _edge(self, center: Tensor, neighbor: Tensor) -> Tensor:
        return neighbor - center if self.relative else neighbor

    def _mean(self, x: Tensor, mean: Tensor) -> Tensor:
        return self.nn1.linear(self._edge(x, mean))

    def _combine(self, x: Tensor, aggregate: Tensor, ptr: Tensor | None) -> Tensor:
        output = _on_pair(self.nn2, x, aggregate, ptr)
        if self.bias is not None:
            output = output + self.bias
        return F.normalize(output, dim=-1) if self.normalize else output


CONVS: dict[str, type[_GraphConv]] = {"edge": EdgeConv, "mr": MRConv, "gin": GINConv, "sage": SAGEConv}
