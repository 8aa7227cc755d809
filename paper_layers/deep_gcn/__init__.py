"""DeepGCNs: graph convolutions with dilated neighbours (Li, Müller, Thabet, Ghanem, ICCV 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paper_layers.deep_gcn.blocks import DenseGCNBlock, PlainGCNBlock, ResGCNBlock
from paper_layers.deep_gcn.checkpoints import load_official
from paper_layers.deep_gcn.convs import EdgeConv, GINConv, MRConv, SAGEConv
from paper_layers.deep_gcn.dilated_knn import DilatedKNN
from paper_layers.deep_gcn.edges import from_edge_index, knn_graph, to_edge_index
from paper_layers.deep_gcn.nets import DeepGCN
from paper_layers.deep_gcn.perceptron import LayerOptions, Perceptron
from paper_layers.deep_gcn.variants import DeepGCNClassifier, DeepGCNPartSegmenter, StaticDeepGCN

if TYPE_CHECKING:
    from paper_layers.deep_gcn.pyg import DynamicEdgeConv as DynamicEdgeConv

__all__ = [
    "DeepGCN",
    "DeepGCNClassifier",
    "DeepGCNPartSegmenter",
    "DenseGCNBlock",
    "DilatedKNN",
    "EdgeConv",
    "GINConv",
    "LayerOptions",
    "MRConv",
    "Perceptron",
    "PlainGCNBlock",
    "ResGCNBlock",
    "SAGEConv",
    "StaticDeepGCN",
    "from_edge_index",
    "knn_graph",
    "load_official",
    "to_edge_index",
]


def __getattr__(name: str) -> Any:
    # Only this layer needs torch_geometric.
    if name == "DynamicEdgeConv":
        from paper_layers.deep_gcn.pyg import DynamicEdgeConv

        return DynamicEdgeConv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
