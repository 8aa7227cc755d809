"""DeepGCNs: graph convolutions with dilated neighbours (Li, Müller, Thabet, Ghanem, ICCV 2019)."""

from paper_layers.deep_gcn.blocks import DenseGCNBlock, PlainGCNBlock, ResGCNBlock
from paper_layers.deep_gcn.checkpoints import load_official
from paper_layers.deep_gcn.convs import EdgeConv, GINConv, MRConv, SAGEConv
from paper_layers.deep_gcn.edges import from_edge_index, knn_graph, to_edge_index
from paper_layers.deep_gcn.knn import DilatedKNN
from paper_layers.deep_gcn.nets import DeepGCN
from paper_layers.deep_gcn.perceptron import Perceptron
from paper_layers.deep_gcn.variants import DeepGCNClassifier, DeepGCNPartSegmenter, StaticDeepGCN

__all__ = [
    "DeepGCN",
    "DeepGCNClassifier",
    "DeepGCNPartSegmenter",
    "DenseGCNBlock",
    "DilatedKNN",
    "EdgeConv",
    "GINConv",
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
