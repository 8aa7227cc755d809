"""DeepGCNs: graph convolutions with dilated neighbours (Li, Müller, Thabet, Ghanem, ICCV 2019)."""

from paper_layers.deep_gcn.edges import from_edge_index, to_edge_index

__all__ = ["from_edge_index", "to_edge_index"]
