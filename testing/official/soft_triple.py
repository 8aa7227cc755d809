"""The official loss, written from the paper's formulas in plain PyTorch, for any dtype; centers stand in columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def relaxed_similarity(embeddings: Tensor, fc: Tensor, classes: int, gamma: float) -> Tensor:
    """(B, d) and (d, C K), column c K + k, to (B, C)."""
    similarity = (F.normalize(embeddings, dim=1) @ F.normalize(fc, dim=0)).unflatten(1, (classes, -1))
    return ((similarity / gamma).softmax(2) * similarity).sum(2)


def pair_mask(classes: int, k: int, device: torch.device | None = None) -> Tensor:
    """Which pairs of all centers, (C K, C K), are two of one class, each pair once."""
    owner = torch.arange(classes, device=device).repeat_interleave(k)
    return (owner[:, None] == owner).triu(1)


def regularizer(fc: Tensor, classes: int, mask: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Half the mean distance of two centers of a class, from the products of all centers."""
    unit = F.normalize(fc, dim=0)
    k = fc.shape[1] // classes
    return (2 + epsilon - 2 * (unit.mT @ unit)[mask]).sqrt().sum() / (classes * k * (k - 1))


def losses(
    embeddings: Tensor, fc: Tensor, labels: Tensor, classes: int, la: float, gamma: float, margin: float
) -> Tensor:
    """The cross-entropy of each row."""
    similarity = relaxed_similarity(embeddings, fc, classes, gamma)
    target = F.one_hot(labels, classes).to(similarity.dtype)
    return F.cross_entropy(la * (similarity - margin * target), labels, reduction="none")


def soft_triple_loss(
    embeddings: Tensor,
    fc: Tensor,
    labels: Tensor,
    classes: int,
    la: float = 20,
    gamma: float = 0.1,
    tau: float = 0.2,
    margin: float = 0.01,
    mask: Tensor | None = None,
) -> Tensor:
    loss = losses(embeddings, fc, labels, classes, la, gamma, margin).mean()
    k = fc.shape[1] // classes
    if tau > 0 and k > 1:
        loss = loss + tau * regularizer(fc, classes, pair_mask(classes, k, fc.device) if mask is None else mask)
    return loss
