"""SoftTriple: metric learning without triplet sampling (Qian et al., ICCV 2019)."""

from paper_layers.soft_triple.evaluation import nmi, recall_at_k

__all__ = ["nmi", "recall_at_k"]
