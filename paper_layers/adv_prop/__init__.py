"""AdvProp: adversarial examples improve image recognition (Xie, Tan, Gong, Wang, Yuille, Le, CVPR 2020)."""

from paper_layers.adv_prop.attack import pgd
from paper_layers.adv_prop.fast import fast_adv_prop_backward
from paper_layers.adv_prop.loss import adv_prop_loss
from paper_layers.adv_prop.norm import SplitBatchNorm, SplitBatchNorm1d, SplitBatchNorm2d, SplitBatchNorm3d
from paper_layers.adv_prop.split import use_split
from paper_layers.adv_prop.sync import SplitSyncBatchNorm

__all__ = [
    "SplitBatchNorm",
    "SplitBatchNorm1d",
    "SplitBatchNorm2d",
    "SplitBatchNorm3d",
    "SplitSyncBatchNorm",
    "adv_prop_loss",
    "fast_adv_prop_backward",
    "pgd",
    "use_split",
]
