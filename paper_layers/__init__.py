"""Ideas from papers as drop-in PyTorch modules with fused kernels."""

from paper_layers import adv_prop, big_bigan, deep_gcn, lip, point_rend, soft_triple, swap
from paper_layers._core.library import show_config
from paper_layers._core.version import __version__
from paper_layers.adv_prop import (
    SplitBatchNorm,
    SplitBatchNorm1d,
    SplitBatchNorm2d,
    SplitBatchNorm3d,
    SplitSyncBatchNorm,
)
from paper_layers.big_bigan import BigBiGANDiscriminator, BigBiGANHeads
from paper_layers.deep_gcn import (
    DeepGCN,
    DenseGCNBlock,
    DilatedKNN,
    EdgeConv,
    GINConv,
    MRConv,
    PlainGCNBlock,
    ResGCNBlock,
    SAGEConv,
)
from paper_layers.lip import LazyLIPPool2d, LIPPool2d
from paper_layers.ops import (
    edge_conv,
    knn,
    lip_pool2d,
    neighbor_reduce,
    point_sample,
    sample_uncertain_points,
    soft_triple_logits,
    soft_triple_loss,
    spectral_linear,
    split_batch_norm,
    uncertain_points,
)
from paper_layers.point_rend import ImplicitPointRendMask, PointRendHead, PointRendMask, PointRendSemantic
from paper_layers.soft_triple import ShardedSoftTripleLoss, SoftTripleLoss

__all__ = [
    "BigBiGANDiscriminator",
    "BigBiGANHeads",
    "DeepGCN",
    "DenseGCNBlock",
    "DilatedKNN",
    "EdgeConv",
    "GINConv",
    "ImplicitPointRendMask",
    "LIPPool2d",
    "LazyLIPPool2d",
    "MRConv",
    "PlainGCNBlock",
    "PointRendHead",
    "PointRendMask",
    "PointRendSemantic",
    "ResGCNBlock",
    "SAGEConv",
    "ShardedSoftTripleLoss",
    "SoftTripleLoss",
    "SplitBatchNorm",
    "SplitBatchNorm1d",
    "SplitBatchNorm2d",
    "SplitBatchNorm3d",
    "SplitSyncBatchNorm",
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
    "soft_triple_logits",
    "soft_triple_loss",
    "spectral_linear",
    "split_batch_norm",
    "swap",
    "uncertain_points",
]
