"""The steps between SoftTriple's matrix products for a chunk of classes: the ops that have kernels.

Scores are (classes K, B): the products of the chunk's centers, not normalized, with the unit embeddings. So every
center is a row over the batch, for any K, and its inverse length is a factor of its row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paper_layers._core.library import define

# A vector that is shorter counts as zero: its cosines are 0 and it has no gradient.
SHORTEST = 1e-12
# Under the root of a distance between two centers, so that it has a slope where they coincide.
ROOT = 1e-5


def inverse_length(x: Tensor) -> Tensor:
    """Return the inverse lengths along the last dimension, kept as one; 0 for vectors that count as zero."""
    square = x.square().sum(-1, keepdim=True)
    long = square > SHORTEST**2
    # NaN must not count as zero.
    return torch.where(long, square, 1).rsqrt() * torch.where(square.isnan(), square, long)


def _labels(labels: Tensor, classes: int, ignore_index: int) -> Tensor:
    if labels.numel():
        low, high = labels.aminmax()
        if low.item() >= 0 and high.item() < classes and not 0 <= ignore_index < classes:
            return labels.clone(memory_format=torch.contiguous_format)  # The usual case, in few ops.
    known = (labels >= 0) & (labels < classes)
    ignored = labels == ignore_index
    wrong = ~(known | ignored)
    if wrong.any():
        raise ValueError(
            f"labels: expected classes from 0 to {classes - 1} or ignore_index, {ignore_index}, got {labels[wrong][0]}"
        )
    return torch.where(ignored, -1, labels)


def _labels_fake(labels: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(labels, memory_format=torch.contiguous_format)


def _centers(centers: Tensor, regularized: bool) -> tuple[Tensor, Tensor, Tensor]:
    inverse = inverse_length(centers)
    if not regularized:
        return inverse[..., 0], centers.new_zeros(()), centers.new_empty(0)
    cosine = (centers @ centers.mT) * inverse * inverse.mT
    distance = ((2 - 2 * cosine).clamp(min=0) + ROOT).sqrt()
    # With W the centers of a class, the gradient of its distances is distance_slope W.
    slope = -distance.reciprocal() * (1 - torch.eye(centers.shape[1], dtype=centers.dtype, device=centers.device))
    own = inverse.square() * (slope * cosine).sum(-1, keepdim=True)
    distance_slope = slope * inverse * inverse.mT - torch.diag_embed(own[..., 0])
    return inverse[..., 0], distance.triu(1).sum(), distance_slope


def _centers_fake(centers: Tensor, regularized: bool) -> tuple[Tensor, Tensor, Tensor]:
    classes, count, _ = centers.shape
    distance_slope = (classes, count, count) if regularized else (0,)
    return centers.new_empty(classes, count), centers.new_empty(()), centers.new_empty(distance_slope)


def _cosines(scores: Tensor, inverse: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cosines (C, K, B), their weights, and the relaxed similarity (C, B)."""
    s = scores.unflatten(0, inverse.shape) * inverse[..., None]
    p = (s / gamma).softmax(1)
    return s, p, (p * s).sum(1)


def _is_target(labels: Tensor, first: int, classes: int) -> Tensor:
    """Return (C, B): whether a class is the row's own."""
    return torch.arange(first, first + classes, device=labels.device)[:, None] == labels


def _forward(
    scores: Tensor, inverse: Tensor, labels: Tensor, first: int, la: float, gamma: float, margin: float
) -> tuple[Tensor, Tensor]:
    own = _is_target(labels, first, inverse.shape[0])
    logits = la * _cosines(scores, inverse, gamma)[2]
    return logits.masked_fill(own, -torch.inf).logsumexp(0), (logits - la * margin).where(own, 0).sum(0)


def _forward_fake(scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = scores.shape[1]
    return scores.new_empty(rows), scores.new_empty(rows)


def _backward(
    scores: Tensor,
    inverse: Tensor,
    labels: Tensor,
    first: int,
    logsumexp: Tensor,
    grad_logsumexp: Tensor,
    grad_target: Tensor,
    la: float,
    gamma: float,
    margin: float,
) -> Tensor:
    s, p, similarity = _cosines(scores, inverse, gamma)
    own = _is_target(labels, first, inverse.shape[0])
    grad = torch.where(own, grad_target, grad_logsumexp * (la * similarity - logsumexp).exp())
    return _weigh(scores, inverse, s, p, similarity, la * grad, gamma)


def _weigh(
    scores: Tensor, inverse: Tensor, s: Tensor, p: Tensor, similarity: Tensor, grad: Tensor, gamma: float
) -> Tensor:
    weight = grad[:, None] * p * (1 + (s - similarity[:, None]) / gamma)
    scores.copy_((weight * inverse[..., None]).flatten(0, 1))
    return (weight * s).sum(2)


def _backward_fake(scores: Tensor, inverse: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(inverse)


def _similarity(scores: Tensor, inverse: Tensor, gamma: float) -> Tensor:
    return _cosines(scores, inverse, gamma)[2]


def _similarity_fake(scores: Tensor, inverse: Tensor, *_: Any) -> Tensor:
    return scores.new_empty(inverse.shape[0], scores.shape[1])


def _similarity_backward(scores: Tensor, inverse: Tensor, grad: Tensor, gamma: float) -> Tensor:
    s, p, similarity = _cosines(scores, inverse, gamma)
    return _weigh(scores, inverse, s, p, similarity, grad, gamma)


def _add_centers(
    grad: Tensor, centers: Tensor, inverse: Tensor, projection: Tensor, distance_slope: Tensor, grad_distance: Tensor
) -> None:
    total = -torch.diag_embed(projection * inverse.square())
    if distance_slope.numel():
        total = total + grad_distance * distance_slope
    grad.add_(total @ centers)


_CLASSES = "Tensor inverse, Tensor labels, SymInt first"
_FACTORS = "float la, float gamma, float margin"
# Labels as int64, -1 for ignore_index; other labels that are not a class are an error.
known_labels = define(
    "soft_triple_labels(Tensor labels, SymInt classes, int ignore_index) -> Tensor",
    _labels,
    _labels_fake,
    vmap=lambda op, _, in_dims, arguments: (op(*arguments), in_dims[0]),
)
# For centers (C, K, d): inverse lengths (C, K), the sum of the classes' distances, and the slope of that sum.
center_norms_and_distances = define(
    "soft_triple_centers(Tensor centers, bool regularized) -> (Tensor, Tensor, Tensor)", _centers, _centers_fake
)
# For the classes from `first` on: the log-sum-exp of the chunk's logits but the row's own; the row's own less margin,
# or 0 where it is not in the chunk.
chunk_forward = define(
    f"soft_triple_chunk(Tensor scores, {_CLASSES}, {_FACTORS}) -> (Tensor, Tensor)", _forward, _forward_fake
)
# Overwrites scores with their gradients and returns the sum of gradient times cosine (C, K).
chunk_backward = define(
    f"soft_triple_chunk_backward_(Tensor(a!) scores, {_CLASSES}, Tensor logsumexp, Tensor grad_logsumexp, "
    f"Tensor grad_target, {_FACTORS}) -> Tensor",
    _backward,
    _backward_fake,
)
# The same for the relaxed similarities (C, B) themselves.
chunk_similarity = define(
    "soft_triple_similarity(Tensor scores, Tensor inverse, float gamma) -> Tensor", _similarity, _similarity_fake
)
chunk_similarity_backward = define(
    "soft_triple_similarity_backward_(Tensor(a!) scores, Tensor inverse, Tensor grad, float gamma) -> Tensor",
    _similarity_backward,
    _backward_fake,
)
# Adds the shares of normalization and distances to the centers' gradient (C, K, d).
accumulate_center_grad_ = define(
    "soft_triple_add_centers_(Tensor(a!) grad, Tensor centers, Tensor inverse, Tensor projection, "
    "Tensor distance_slope, Tensor grad_distance) -> ()",
    _add_centers,
    lambda *_: None,  # It writes to grad alone.
)
