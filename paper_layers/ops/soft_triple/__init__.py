"""SoftTriple: the loss and the class logits of embeddings and centers, computed in chunks of classes."""

from paper_layers.ops.soft_triple.logits import soft_triple_logits
from paper_layers.ops.soft_triple.loss import soft_triple_loss

__all__ = ["soft_triple_logits", "soft_triple_loss"]
