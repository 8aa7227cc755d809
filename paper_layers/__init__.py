"""Ideas from papers as drop-in PyTorch modules with fused kernels."""

from paper_layers import adv_prop, big_bigan, deep_gcn, lip, point_rend, soft_triple, swap
from paper_layers._core.library import show_config
from paper_layers._core.version import __version__
from paper_layers.adv_prop import SplitBatchNorm, SplitBatchNorm1d, SplitBatchNorm2d, SplitBatchNorm3d
from paper_layers.lip import LazyLIPPool2d, LIPPool2d
from paper_layers.ops import (
    edge_conv,
    knn,
    lip_pool2d,
    neighbor_reduce,
    point_sample,
    sample_uncertain_points,
    soft_triple_loss,
    split_batch_norm,
    uncertain_points,
)
from paper_layers.soft_triple import SoftTripleLoss

__all__ = [
    "LIPPool2d",
    "LazyLIPPool2d",
    "SoftTripleLoss",
    "SplitBatchNorm",
    "SplitBatchNorm1d",
    "SplitBatchNorm2d",
    "SplitBatchNorm3d",
    "__version__",
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
