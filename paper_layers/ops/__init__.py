"""Functions on tensors, with fused kernels for CPU and CUDA."""

from paper_layers.ops.edge_conv import edge_conv
from paper_layers.ops.knn import knn
from paper_layers.ops.lip_pool2d import lip_pool2d
from paper_layers.ops.neighbor_reduce import neighbor_reduce
from paper_layers.ops.point_sample import point_sample
from paper_layers.ops.soft_triple import soft_triple_logits, soft_triple_loss
from paper_layers.ops.spectral_linear import spectral_linear
from paper_layers.ops.split_batch_norm import split_batch_norm
from paper_layers.ops.uncertain_points import sample_uncertain_points, uncertain_points

__all__ = [
    "edge_conv",
    "knn",
    "lip_pool2d",
    "neighbor_reduce",
    "point_sample",
    "sample_uncertain_points",
    "soft_triple_logits",
    "soft_triple_loss",
    "spectral_linear",
    "split_batch_norm",
    "uncertain_points",
]
