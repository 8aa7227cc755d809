"""PyG's edge convolutions on our ops; `paper_layers.swap.graph_conv` changes a model's convolutions into these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.nn.aggr.basic import MaxAggregation
from torch_geometric.nn.models.mlp import MLP

from paper_layers._core import checks
from paper_layers._core.fusing import known, readable, unchanged
from paper_layers.deep_gcn._edge_norm import ActNorm, Order, edge_max, may_fuse
from paper_layers.deep_gcn.edges import table_of_edges, to_edge_index
from paper_layers.ops.knn import knn

Pair = tuple[Tensor, Tensor]
# Use a table only if it has at most this many slots per edge.
_MAX_SLOTS_PER_EDGE = 2
_STEPS = ("propagate", "message", "aggregate", "update")
_HOOKS = tuple(f"_{step}_forward{when}_hooks" for step in _STEPS[:3] for when in ("_pre", ""))

known(pyg.Linear, MLP, pyg.BatchNorm, MaxAggregation, pyg.EdgeConv, pyg.DynamicEdgeConv)


def _methods(kind: Any) -> tuple[Any, ...]:
    """Return the methods with which the class computes its messages."""
    return kind.message, kind.aggregate, kind.update


class _FusedEdgeConv(pyg.MessagePassing):
    """Run the first linear layer on nodes in place of edges, and compute a maximum without storing any edge."""

    nn: Any
    _host_methods: ClassVar[tuple[Any, ...]]

    def _split(self, x: Any) -> tuple[Any, list[nn.Module]] | None:
        """Return the first linear layer and the layers after it; None where PyG's own path must be taken."""
        if self.node_dim not in (-2, 0) or self.decomposed_layers > 1 or self._is_watched():
            return None
        layers = list(_layers(self.nn))
        if not layers or not readable(layers[0], nn.Linear, pyg.Linear):
            return None
        width = layers[0].weight.shape[1]
        fits = isinstance(x, tuple | list) and len(x) == 2 and all(_is_rows(part, width // 2) for part in x)
        return (layers[0], layers[1:]) if fits and width % 2 == 0 and x[0].dtype == x[1].dtype else None

    def _is_watched(self) -> bool:
        """Return True where an explainer, a hook or a changed method needs PyG's steps."""
        own = self.__dict__
        if self.explain or _methods(type(self)) != self._host_methods or any(own[hooks] for hooks in _HOOKS):
            return True
        changed = [step for step in _STEPS if step in own]
        # An explainer leaves the class's own `propagate` on the object.
        usual = [getattr(type(self), name, None) for name in ("_jinja_propagate", "_orig_propagate")]
        return any(step != "propagate" or getattr(own[step], "__func__", None) not in usual for step in changed)

    def _terms(self, linear: Any, x: Pair) -> Pair:
        """Split the linear layer on [x_i, x_j - x_i] into a term of i and a term of j."""
        own, difference = linear.weight.chunk(2, 1)
        return F.linear(x[1], own - difference, linear.bias), F.linear(x[0], difference)

    def _fused(self, layers: list[nn.Module]) -> ActNorm | None:
        """Return activation, norm and their order, or None where `edge_max` can't compute them."""
        if not readable(self.aggr_module, MaxAggregation):
            return None
        return _act_and_norm([layer for layer in layers if not _is_identity(layer)])

    def _on_edges(self, x: Pair, source: Tensor, target: Tensor, linear: Any, layers: list[nn.Module]) -> Tensor:
        center, neighbor = self._terms(linear, x)
        z = center.index_select(0, target) + neighbor.index_select(0, source)
        for layer in layers:
            z = layer(z)
        return self.aggregate(z, index=target, dim_size=len(center))


class EdgeConv(_FusedEdgeConv, pyg.EdgeConv):
    """PyG's EdgeConv with fewer multiplications and without edges in memory."""

    _host_methods = _methods(pyg.EdgeConv)
    propagate = pyg.MessagePassing.propagate  # Otherwise PyG takes the generated method, which can't explain.

    def forward(self, x: Tensor | Pair, edge_index: Any) -> Tensor:
        """Convolve as PyG's EdgeConv does."""
        pair = (x, x) if isinstance(x, Tensor) else x
        edge_index = self._as_edge_index(pair, edge_index)
        split = self._split(pair) if unchanged(pyg.EdgeConv) else None
        if split is None or not _are_edges(edge_index):
            return pyg.EdgeConv.forward(self, x, edge_index)
        source, target = edge_index.long() if self.flow == "source_to_target" else edge_index.long().flip(0)
        if not (_are_below(source, len(pair[0])) and _are_below(target, len(pair[1]))):
            return pyg.EdgeConv.forward(self, x, edge_index)  # It raises the error.
        linear, layers = split
        fused = self._fused(layers)
        if fused is None:
            return self._on_edges(pair, source, target, linear, layers)
        degree = torch.bincount(target, minlength=len(pair[1]))
        most = int(degree.max()) if len(target) else 0
        if len(pair[1]) * most > _MAX_SLOTS_PER_EDGE * len(target):
            return self._on_edges(pair, source, target, linear, layers)
        return edge_max(*self._terms(linear, pair), table_of_edges(source, target, degree, most), fused)

    def _as_edge_index(self, x: Any, adjacency: Any) -> Any:
        """Return the edges of a COO adjacency that fits: PyG writes to it after its forward has saved the indices."""
        if type(adjacency) is not Tensor or adjacency.layout != torch.sparse_coo or self.flow != "source_to_target":
            return adjacency
        sizes = [part.shape[self.node_dim] for part in x if isinstance(part, Tensor)]
        return adjacency.indices().flip(0) if sizes[::-1] == list(adjacency.shape) else adjacency


class DynamicEdgeConv(_FusedEdgeConv, pyg.DynamicEdgeConv):
    r"""PyG's DynamicEdgeConv with exact neighbours, fewer multiplications and without edges in memory.

    .. math:: x_i' = \max_{j \in \mathrm{kNN}(x_i)} h([x_i, x_j - x_i])

    The layer of Wang et al., "Dynamic Graph CNN for Learning on Point Clouds", 2019, for models with PyG. It needs
    neither pyg-lib nor torch-cluster. Neighbours are the nearest by the features x.

    Args:
        nn: The network h, on 2 C channels.
        k: Neighbours of each point.
        aggr: "max", "mean", "add" or another of PyG's aggregations.
        num_workers: For PyG's signature; without effect.
        **kwargs: Other arguments of PyG's `MessagePassing`.

    Raises:
        TypeError: k is not an int.
        ValueError: k is less than 1, or the features don't have two dimensions.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers.deep_gcn import DynamicEdgeConv
        >>> conv = DynamicEdgeConv(nn.Sequential(nn.Linear(6, 64), nn.ReLU()), k=8)
        >>> conv(torch.randn(100, 3), batch=torch.arange(4).repeat_interleave(25)).shape
        torch.Size([100, 64])
    """

    _host_methods = _methods(pyg.DynamicEdgeConv)
    propagate = pyg.MessagePassing.propagate

    def __init__(self, nn: Any, k: int, aggr: Any = "max", num_workers: int = 1, **kwargs: Any):
        checks.integer("k", k, 1)
        # PyG's own constructor needs pyg-lib or torch-cluster.
        pyg.MessagePassing.__init__(self, aggr=aggr, flow="source_to_target", **kwargs)
        self.nn, self.k, self.num_workers = nn, int(k), num_workers
        self.reset_parameters()

    def forward(self, x: Tensor | Pair, batch: Tensor | tuple[Tensor | None, Tensor | None] | None = None) -> Tensor:
        """Convolve as PyG's DynamicEdgeConv does."""
        if not unchanged(pyg.DynamicEdgeConv):
            return pyg.DynamicEdgeConv.forward(self, x, batch)  # type: ignore[arg-type]
        pair = (x, x) if isinstance(x, Tensor) else x
        if pair[0].dim() != 2:
            raise ValueError(f"x: expected shape (N, C), as the graph is dynamic, got {tuple(pair[0].shape)}")
        both = batch if isinstance(batch, tuple) else (batch, batch)
        points_batch, query_batch = (None if some is None else some.long() for some in both)
        query, points = pair[1].detach(), None if pair[0] is pair[1] else pair[0].detach()
        batches: dict[str, Any] = (
            {"batch": query_batch} if points is None else {"batch": query_batch, "points_batch": points_batch}
        )
        index = knn(query, points, k=self.k, **batches)[0]
        split = self._split(pair)
        fused = None if split is None else self._fused(split[1])
        if split is not None and fused is not None:
            return edge_max(*self._terms(split[0], pair), index, fused)
        edge_index = to_edge_index(index)
        if split is None:
            return self.propagate(edge_index, x=pair)
        return self._on_edges(pair, edge_index[0], edge_index[1], *split)


def _is_rows(x: Any, channels: int) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == channels and x.dtype in checks.FLOATING


def _are_edges(edge_index: Any) -> bool:
    """Return True for a plain tensor of edges, not a sparse one or one of PyG's own."""
    if type(edge_index) is not Tensor or edge_index.layout != torch.strided:
        return False
    return edge_index.dtype in (torch.int64, torch.int32) and edge_index.dim() == 2 and len(edge_index) == 2


def _are_below(numbers: Tensor, count: int) -> bool:
    least, most = (int(t) for t in numbers.aminmax()) if len(numbers) else (0, -1)
    return least >= 0 and most < count


def _layers(module: Any) -> Iterator[Any]:
    if readable(module, nn.Sequential):
        for part in module:
            yield from _layers(part)
    elif readable(module, MLP) and not module.supports_norm_batch:
        for i, linear in enumerate(module.lins):
            yield linear
            if i < len(module.norms):
                act = [] if module.act is None else [module.act]
                yield from [*act, module.norms[i]] if module.act_first else [module.norms[i], *act]
                yield nn.Dropout(module.dropout[i]).train(module.training)
    else:
        yield module


def _is_identity(layer: Any) -> bool:
    if readable(layer, nn.Dropout):
        return layer.p == 0 or not layer.training
    return readable(layer, nn.Identity)


def _act_and_norm(layers: list[nn.Module]) -> ActNorm | None:
    """Return at most one activation and one batch norm, and their order; None for other layers."""
    parts: list[Any] = [p.module if readable(p, pyg.BatchNorm) and not p.allow_single_element else p for p in layers]
    acts = [p for p in parts if may_fuse(p, None)]
    norms = [p for p in parts if readable(p, nn.BatchNorm1d, nn.SyncBatchNorm)]
    if len(acts) > 1 or len(norms) > 1 or len(acts) + len(norms) != len(parts):
        return None
    order: Order = "act_norm" if parts and parts[0] in acts else "norm_act"
    return ActNorm(acts[0] if acts else None, norms[0] if norms else None, order)
