"""SoftTriple (Qian et al., ICCV 2019): a metric-learning loss with several centers for each class and no triplets."""

from paper_layers.soft_triple.checkpoints import load_official
from paper_layers.soft_triple.evaluation import nmi, recall_at_k
from paper_layers.soft_triple.loss import SoftTripleLoss
from paper_layers.soft_triple.parameters import param_groups
from paper_layers.soft_triple.sharded import ShardedSoftTripleLoss

__all__ = [
    "ShardedSoftTripleLoss",
    "SoftTripleLoss",
    "load_official",
    "nmi",
    "param_groups",
    "recall_at_k",
]
