"""Ideas from papers as drop-in PyTorch modules with fused kernels."""

__version__ = "0.1.0"

from paper_layers import adv_prop, big_bigan, deep_gcn, lip, point_rend, soft_triple, swap
from paper_layers.adv_prop import SplitBatchNorm1d, SplitBatchNorm2d, SplitBatchNorm3d
from paper_layers.lip import LazyLIPPool2d, LIPPool2d
from paper_layers.ops._library import show_config
from paper_layers.ops.edge_conv import edge_conv
from paper_layers.ops.knn import knn
from paper_layers.ops.lip_pool2d import lip_pool2d
from paper_layers.ops.neighbor_reduce import neighbor_reduce
from paper_layers.ops.point_sample import point_sample
from paper_layers.ops.sample_uncertain_points import sample_uncertain_points
from paper_layers.ops.soft_triple import soft_triple_loss
from paper_layers.ops.split_batch_norm import split_batch_norm
from paper_layers.ops.uncertain_points import uncertain_points
from paper_layers.soft_triple import SoftTripleLoss

__all__ = [
    "LIPPool2d",
    "LazyLIPPool2d",
    "SoftTripleLoss",
    "SplitBatchNorm1d",
    "SplitBatchNorm2d",
    "SplitBatchNorm3d",
    "adv_prop",
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
    "soft_triple",
    "soft_triple_loss",
    "split_batch_norm",
    "swap",
    "uncertain_points",
]
