"""Run a perceptron on each edge of a graph, for layers that must be called."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from paper_layers._core.fusing import readable
from paper_layers.deep_gcn.edges import to_edge_index
from paper_layers.deep_gcn.perceptron import Perceptron, call_perceptron
from paper_layers.ops.neighbor_reduce import neighbor_reduce


def sort_by_cloud(target: Tensor, ptr: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return an order of the edges by their target's cloud, and where each cloud starts in this order."""
    if ptr is None:
        return torch.arange(len(target), device=target.device), None
    cloud, order = torch.searchsorted(ptr, target, right=True).sort(stable=True)
    return order, torch.searchsorted(cloud, torch.arange(1, len(ptr) + 1, device=ptr.device))


def edge_outputs(layer: nn.Module, rows: Tensor, ptr: Tensor | None) -> Tensor:
    """Run the perceptron on rows, except for the dropout of a plain perceptron: see `dropout_channels`."""
    if readable(layer, Perceptron):
        return cast(Perceptron, layer).activate_and_normalize(cast(Perceptron, layer).linear(rows), ptr)
    return call_perceptron(layer, rows, ptr)


def dropout_channels(layer: nn.Module, x: Tensor, ptr: Tensor | None) -> Tensor:
    """Apply the dropout that `edge_outputs` left out."""
    return cast(Perceptron, layer).dropout_channels(x, ptr) if readable(layer, Perceptron) else x


def reduce_each_edge(
    layer: nn.Module,
    x: Tensor,
    index: Tensor,
    ptr: Tensor | None,
    reduction: str,
    rows: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Run the perceptron on one row for each edge of a table, and reduce its outputs at each node."""
    nodes = x.flatten(0, -2)
    source, target = to_edge_index(index)
    if x.dim() == 3:
        ptr = torch.arange(len(x) + 1, device=x.device) * x.shape[1]
    messages = edge_outputs(layer, rows(nodes[target], nodes[source]), sort_by_cloud(target, ptr)[1])
    # The position of each edge of the table among the messages.
    table = index.flatten(0, -2)
    numbers = (table >= 0).flatten().cumsum(0).view_as(table) - 1
    output = neighbor_reduce(messages, numbers.where(table >= 0, -1), reduction)
    return output.view(*x.shape[:-1], output.shape[-1])
