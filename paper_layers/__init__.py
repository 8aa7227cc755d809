"""Ideas from papers as drop-in PyTorch modules with fused kernels."""

__version__ = "0.1.0"

from paper_layers import big_bigan, deep_gcn, lip, point_rend, swap
from paper_layers.lip import LazyLIPPool2d, LIPPool2d
from paper_layers.ops._library import show_config
from paper_layers.ops.edge_conv import edge_conv
from paper_layers.ops.knn import knn
from paper_layers.ops.lip_pool2d import lip_pool2d
from paper_layers.ops.neighbor_reduce import neighbor_reduce
from paper_layers.ops.point_sample import point_sample
from paper_layers.ops.sample_uncertain_points import sample_uncertain_points
from paper_layers.ops.uncertain_points import uncertain_points

__all__ = [
    "LIPPool2d",
    "LazyLIPPool2d",
    "big_bigan",
    "deep_gcn",
    "edge_conv",
    "knn",
    "lip",
    "lip_pool2d",
    "neighbor_reduce",
    "point_rend",
    "point_sample",
    "sample_uncertain_points",
    "show_config",
    "swap",
    "uncertain_points",
]
