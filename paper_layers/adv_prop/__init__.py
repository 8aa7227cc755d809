"""AdvProp: adversarial examples improve image recognition (Xie et al., CVPR 2020)."""

from paper_layers.adv_prop.branch import branch
from paper_layers.adv_prop.norm import SplitBatchNorm1d, SplitBatchNorm2d, SplitBatchNorm3d

__all__ = ["SplitBatchNorm1d", "SplitBatchNorm2d", "SplitBatchNorm3d", "branch"]
