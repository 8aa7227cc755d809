"""PyG's edge convolutions, computed as ours are; `paper_layers.swap.graph_conv` turns a model's into these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.nn.models.mlp import MLP

from paper_layers.deep_gcn.edge_norm import max_over_edges
from paper_layers.deep_gcn.edges import from_edge_index, to_edge_index
from paper_layers.ops.knn import knn

Pair = tuple[Tensor, Tensor]
# What a table may have more places than there are edges.
_SPARSE = 2


class _FusedEdgeConv:
    """Messages from a linear layer on each node in place of each edge, and where the rest allows it no edge at all."""

    nn: Any
    aggr: Any
    aggregate: Callable[..., Tensor]
    propagate: Callable[..., Tensor]

    def _on_table(self, x: Pair, index: Tensor) -> Tensor:
        split = _split(self.nn)
        if split is None:
            return self.propagate(to_edge_index(index), x=x)
        linear, rest = split
        own, difference = linear.weight.chunk(2, 1)
        center, neighbor = F.linear(x[1], own - difference, linear.bias), F.linear(x[0], difference)
        layers = [layer for layer in rest if not _does_nothing(layer)]
        fused = _act_and_norm(layers) if self.aggr == "max" else None
        if fused is not None:
            output = max_over_edges(center, neighbor, index, *fused)
            return output.where((index >= 0).any(-1, keepdim=True), 0)
        source, target = to_edge_index(index)
        z = center[target] + neighbor[source]
        for layer in layers:
            z = layer(z)
        return self.aggregate(z, index=target, dim_size=len(center))


class EdgeConv(_FusedEdgeConv, pyg.EdgeConv):
    """PyG's EdgeConv with fewer products and without edges in memory."""

    def forward(self, x: Tensor | Pair, edge_index: Any) -> Tensor:
        """As in PyG."""
        pair = (x, x) if isinstance(x, Tensor) else x
        if not isinstance(edge_index, Tensor) or edge_index.layout != torch.strided or _split(self.nn) is None:
            return pyg.EdgeConv.forward(self, x, edge_index)
        target = edge_index[1 if self.flow == "source_to_target" else 0]
        places = len(pair[1]) * int(torch.bincount(target, minlength=1).max()) if len(target) else 0
        if places > _SPARSE * len(target):
            return pyg.EdgeConv.forward(self, x, edge_index)
        rows = max(len(pair[0]), len(pair[1]))
        return self._on_table(pair, from_edge_index(edge_index, rows, flow=self.flow)[: len(pair[1])])


class DynamicEdgeConv(_FusedEdgeConv, pyg.DynamicEdgeConv):
    """PyG's DynamicEdgeConv with exact neighbours, fewer products and without edges in memory."""

    def forward(self, x: Tensor | Pair, batch: Tensor | tuple[Tensor | None, Tensor | None] | None = None) -> Tensor:
        """As in PyG; needs neither pyg-lib nor torch-cluster."""
        pair = (x, x) if isinstance(x, Tensor) else x
        of_points, of_queries = batch if isinstance(batch, tuple) else (batch, batch)
        query, points = pair[1].detach(), None if pair[0] is pair[1] else pair[0].detach()
        batches: dict[str, Any] = (
            {"batch": of_queries} if points is None else {"batch": of_queries, "points_batch": of_points}
        )
        return self._on_table(pair, knn(query, points, k=self.k, **batches)[0])


def _split(module: Any) -> tuple[Any, list[nn.Module]] | None:
    """The linear layer that comes first and the layers after it; None where that is not how it is made."""
    layers = list(_layers(module))
    if not layers or not isinstance(layers[0], nn.Linear | pyg.Linear) or any(_is_watched(m) for m in layers):
        return None
    return layers[0], layers[1:]


def _layers(module: Any) -> Iterator[Any]:
    if _is_watched(module):
        yield module
    elif type(module) is nn.Sequential:
        for part in module:
            yield from _layers(part)
    elif type(module) is MLP and not module.supports_norm_batch:
        for i, linear in enumerate(module.lins):
            yield linear
            if i < len(module.norms):
                act = [] if module.act is None else [module.act]
                yield from [*act, module.norms[i]] if module.act_first else [module.norms[i], *act]
                yield nn.Dropout(module.dropout[i]).train(module.training)
    else:
        yield module


def _is_watched(module: Any) -> bool:
    """Whether hooks wait for its call."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return isinstance(module, nn.Module) and any(getattr(module, kind) for kind in kinds)


def _does_nothing(layer: Any) -> bool:
    if isinstance(layer, nn.Dropout):
        return layer.p == 0 or not layer.training
    return isinstance(layer, nn.Identity)


def _act_and_norm(layers: list[nn.Module]) -> tuple[nn.Module | None, Any, Any] | None:
    """At most one activation and one batch norm, and their order; None for anything else."""
    parts = [layer.module if isinstance(layer, pyg.BatchNorm) else layer for layer in layers]
    acts = [p for p in parts if type(p) in (nn.ReLU, nn.LeakyReLU) or (type(p) is nn.PReLU and p.num_parameters == 1)]
    norms = [p for p in parts if type(p) in (nn.BatchNorm1d, nn.SyncBatchNorm)]
    if len(acts) > 1 or len(norms) > 1 or len(acts) + len(norms) != len(parts):
        return None
    order = "act_norm" if parts and parts[0] in acts else "norm_act"
    return acts[0] if acts else None, norms[0] if norms else None, order
