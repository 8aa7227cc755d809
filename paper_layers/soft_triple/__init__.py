"""SoftTriple (Qian et al., ICCV 2019): a metric-learning loss with several centers for each class and no triplets."""

from paper_layers.soft_triple.loss import SoftTripleLoss

__all__ = ["SoftTripleLoss"]
