"""Convert tables of neighbours, as `paper_layers.knn` returns them, to PyG's `edge_index` and back."""

from __future__ import annotations

import torch
from torch import Tensor

from paper_layers._core import checks
from paper_layers._core.tracing import leaf
from paper_layers.ops.knn import knn

FLOWS = ("source_to_target", "target_to_source")


@leaf
def to_edge_index(index: Tensor, flow: str = "source_to_target") -> Tensor:
    """List the edges of a table of neighbours as PyG does.

    Args:
        index: Neighbours of each node, int64 or int32 of shape (N, k), or (B, N, k) counting within each of B clouds
            of N nodes; -1 is no neighbour.
        flow: PyG's name: with "source_to_target", row 0 holds the neighbours and row 1 the centres; with
            "target_to_source", row 0 holds the centres.

    Returns:
        Edges of shape (2, E), centre by centre, in the order of the table.

    Raises:
        TypeError: `index` is neither an int64 nor an int32 tensor.
        ValueError: `index` has a wrong shape or a number below -1, or `flow` is unknown.

    Example:
        >>> import torch
        >>> from paper_layers.deep_gcn import to_edge_index
        >>> to_edge_index(torch.tensor([[1, 2], [0, -1], [1, 0]]))
        tensor([[1, 2, 0, 1, 0],
                [0, 0, 1, 2, 2]])
    """
    index = _int64("index", index)
    _check_flow(flow)
    checks.shape("index", index, ("N", "k"), ("B", "N", "k"))
    there = index >= 0
    # Neighbours of (N, k) may be rows of another tensor, whose size is unknown here.
    check_nodes(index.where(index != -1, 0), index.shape[1] if index.dim() == 3 else None, "index")
    if index.dim() == 3:
        index = index + torch.arange(index.shape[0], device=index.device)[:, None, None] * index.shape[1]
    center = torch.arange(index.shape[:-1].numel(), device=index.device).view(*index.shape[:-1], 1).expand_as(index)
    edges = torch.stack([index[there], center[there]])
    return edges if flow == FLOWS[0] else edges.flip(0)


@leaf
def from_edge_index(edge_index: Tensor, num_nodes: int, k: int | None = None, flow: str = "source_to_target") -> Tensor:
    """Make a table of neighbours from PyG's edges.

    Args:
        edge_index: Edges of shape (2, E), int64 or int32.
        num_nodes: The number of nodes N.
        k: Columns of the table; default the largest number of neighbours.
        flow: See `to_edge_index`.

    Returns:
        Neighbours of shape (N, k) in the order of the edges; -1 fills each row.

    Raises:
        TypeError: `edge_index` is neither an int64 nor an int32 tensor.
        ValueError: A shape is wrong, `flow` is unknown, an edge names a node that does not exist, or a node has more
            than k neighbours.

    Example:
        >>> import torch
        >>> from paper_layers.deep_gcn import from_edge_index
        >>> from_edge_index(torch.tensor([[1, 2, 0], [0, 0, 1]]), num_nodes=3)
        tensor([[ 1,  2],
                [ 0, -1],
                [-1, -1]])
    """
    edge_index = _int64("edge_index", edge_index)
    _check_flow(flow)
    checks.shape("edge_index", edge_index, (2, "E"))
    check_nodes(edge_index, num_nodes)
    neighbor, center = edge_index if flow == FLOWS[0] else edge_index.flip(0)
    degree = torch.bincount(center, minlength=num_nodes)
    most = int(degree.max()) if num_nodes else 0
    if k is None:
        k = most
    elif most > k:
        raise ValueError(f"k: expected at least {most}, the most neighbours of a node, got {k}")
    return table_of_edges(neighbor, center, degree, k)


def table_of_edges(neighbor: Tensor, center: Tensor, degree: Tensor, k: int) -> Tensor:
    """Return the table of k columns, from the edges and the number of neighbours of each centre."""
    center, order = center.sort(stable=True)
    first = degree.cumsum(0) - degree
    table = neighbor.new_full((len(degree), k), -1)
    table[center, torch.arange(len(center), device=center.device) - first[center]] = neighbor[order]
    return table


@leaf
def knn_graph(
    x: Tensor,
    k: int,
    batch: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    cosine: bool = False,
) -> Tensor:
    """Find the edges to each node's k nearest, exactly: PyG's `knn_graph` without torch-cluster or pyg-lib.

    Args:
        x: Features of shape (N, C).
        k: Neighbours of each node.
        batch: The cloud of each node, ascending, of shape (N,).
        loop: Let a node be its own neighbour.
        flow: See `to_edge_index`.
        cosine: Compare angles in place of Euclidean distances.

    Returns:
        Edges of shape (2, E), nearest first for each node; fewer than k for each node of a small cloud.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape or a value is wrong.

    Example:
        >>> import torch
        >>> from paper_layers.deep_gcn import knn_graph
        >>> knn_graph(torch.tensor([[0.0], [1.0], [3.0]]), k=1)
        tensor([[1, 0, 1],
                [0, 1, 2]])
    """
    metric = "cosine" if cosine else "sqeuclidean"
    return to_edge_index(knn(x.detach(), k=k, batch=batch, metric=metric, include_self=loop)[0], flow)


def _int64(name: str, value: Tensor) -> Tensor:
    """Return an int64 or int32 tensor as int64."""
    return checks.int64(name, value, *getattr(value, "shape", ()))


def check_nodes(nodes: Tensor, count: int | None, name: str = "edge_index") -> None:
    """Refuse nodes that do not exist. While torch traces, the values are unknown and pass."""
    if nodes.numel() == 0 or torch.compiler.is_compiling() or nodes.is_meta:
        return
    least, most = (int(t) for t in nodes.aminmax())
    if least < 0 or (count is not None and most >= count):
        limit = "" if count is None else f" to {count - 1}"
        raise ValueError(f"{name}: expected nodes from 0{limit}, got {least} to {most}")


def _check_flow(flow: str) -> None:
    checks.choice("flow", flow, FLOWS)
