"""Node labelling on many graphs in one file; any selection of them can be joined to one graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from benchmarks.claims.training import Data, two_thirds
from paper_layers.deep_gcn import from_edge_index


class Rows:
    """Rows of consecutive graphs, indexed by the numbers of the graphs."""

    def __init__(self, values: Tensor, ptr: Tensor):
        self.values, self.ptr = values, ptr

    def __len__(self) -> int:
        return len(self.ptr) - 1

    def __getitem__(self, numbers: Tensor) -> Tensor:
        return self.values[torch.cat([torch.arange(*self.ptr[i : i + 2]) for i in numbers.tolist()])]


class Graphs(Rows):
    """Features, and tables of neighbours numbered within each graph."""

    def __init__(self, features: Tensor, index: Tensor, ptr: Tensor):
        super().__init__(features, ptr)
        self.index = Rows(index, ptr)

    def __getitem__(self, numbers: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        size = self.ptr.diff()[numbers]
        start = (size.cumsum(0) - size).repeat_interleave(size)[:, None]
        index = self.index[numbers]
        return super().__getitem__(numbers), torch.where(index < 0, -1, index + start)


def load(path: str | Path) -> tuple[Data, Data]:
    """Split into two thirds of the graphs for training and one third for tests.

    The npz file has `features` (N, C), `node_labels` (N,), `edge_index` (2, E), and `graph` (N,): the graph of each
    node, ascending.
    """
    with np.load(path) as file:
        features, labels = torch.from_numpy(file["features"]).float(), torch.from_numpy(file["node_labels"]).long()
        edges, graph = torch.from_numpy(file["edge_index"]).long(), torch.from_numpy(file["graph"]).long()
    ptr = torch.searchsorted(graph, torch.arange(int(graph.max()) + 2))
    index = from_edge_index(edges, len(graph))
    index = torch.where(index < 0, -1, index - ptr[graph][:, None])
    train, test = two_thirds(len(ptr) - 1)

    seen = Rows(features, ptr)[train]
    graphs = Graphs((features - seen.mean(0)) / seen.std(0).clamp(min=1e-6), index, ptr)
    targets = Rows(labels, ptr)
    return (Subset(graphs, train), Subset(targets, train)), (Subset(graphs, test), Subset(targets, test))
