"""SoftTriple: the op on class centers, its backward, and the functions that users call."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from paper_layers._core import checks, dtypes, values
from paper_layers._core.differentiable import differentiable
from paper_layers._core.library import define
from paper_layers._core.tracing import leaf
from paper_layers._core.vmap import one_by_one
from paper_layers.ops.soft_triple import chunk_ops
from paper_layers.ops.soft_triple.chunks import Chunks, check, product_flops, relaxed_logits
from paper_layers.ops.soft_triple.rows import REDUCTIONS, reduce_rows


@torch.no_grad()
def _forward(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    la: float,
    gamma: float,
    margin: float,
    regularized: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chunks = Chunks(embeddings, centers, chunk_size)
    unit, (_, count, _) = chunks.unit, centers.shape
    target, distance = unit.new_zeros(len(unit)), unit.new_zeros(())
    logsumexps = [torch.full_like(target, -torch.inf)]
    inverses, distance_slopes = [unit.new_empty(0, count)], [unit.new_empty((0, count, count) if regularized else 0)]
    for classes, chunk, scores in chunks:
        inverse, distances, distance_slope = chunk_ops.center_norms_and_distances(chunk, regularized)
        logsumexp, own = chunk_ops.chunk_forward(scores, inverse, labels, classes.start, la, gamma, margin)
        logsumexps.append(logsumexp)
        target += own
        distance += distances
        inverses.append(inverse)
        distance_slopes.append(distance_slope)
    return torch.stack(logsumexps).logsumexp(0), target, distance, torch.cat(inverses), torch.cat(distance_slopes)


def _forward_fake(embeddings: Tensor, centers: Tensor, *others: Any) -> tuple[Tensor, ...]:
    rows, (classes, count), regularized = embeddings.shape[0], centers.shape[:2], others[-2]
    shapes = [[rows], [rows], [], [classes, count], [classes, count, count] if regularized else [0]]
    dtype = dtypes.accumulation(embeddings, centers)
    return tuple(embeddings.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.no_grad()
def _backward(
    grad_logsumexp: Tensor,
    grad_target: Tensor,
    grad_distance: Tensor,
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    inverse: Tensor,
    distance_slope: Tensor,
    la: float,
    gamma: float,
    margin: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    grads = (logsumexp, grad_logsumexp.contiguous(), grad_target.contiguous())

    def scores_to_grads_(classes: slice, scores: Tensor) -> Tensor:
        return chunk_ops.chunk_backward(scores, inverse[classes], labels, classes.start, *grads, la, gamma, margin)

    return Chunks(embeddings, centers, chunk_size).chunked_backward(
        scores_to_grads_, inverse, distance_slope, grad_distance
    )


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    embeddings, centers = arguments[3:5]
    return embeddings.new_empty(embeddings.shape), centers.new_empty(centers.shape)


def _backward_flops(*arguments: Any) -> int:
    """Count the scores, which are computed again, and two products with their gradients."""
    embeddings, centers, slope = arguments[3], arguments[4], arguments[8]
    return 2 * product_flops(embeddings, centers) + product_flops(embeddings, centers, len(slope) > 1)


_FACTORS = "float la, float gamma, float margin"
_forward_op = define(
    f"soft_triple(Tensor embeddings, Tensor centers, Tensor labels, {_FACTORS}, bool regularized, int chunk_size) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    flops=lambda embeddings, centers, labels, la, gamma, margin, regularized, size: product_flops(
        embeddings, centers, regularized
    ),
)
_backward_op = define(
    "soft_triple_backward(Tensor grad_logsumexp, Tensor grad_target, Tensor grad_distance, Tensor embeddings, "
    f"Tensor centers, Tensor labels, Tensor logsumexp, Tensor inverse, Tensor distance_slope, {_FACTORS}, "
    "int chunk_size) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    flops=_backward_flops,
)


def _parts(
    embeddings: Tensor, centers: Tensor, labels: Tensor, la: float, gamma: float, margin: float, regularized: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable reference for the op's first three outputs."""
    own = torch.arange(centers.shape[0], device=labels.device) == labels[:, None]
    logits = relaxed_logits(embeddings, centers, la, gamma)
    # Finite: with one class alone, a log-sum-exp of -infinity has no second derivative.
    others = logits.masked_fill(own, torch.finfo(logits.dtype).min).logsumexp(1)
    distance = logits.new_zeros(())
    if regularized:
        w = centers.to(logits.dtype)
        w = w * chunk_ops.inverse_length(w)
        distance = ((2 - 2 * w @ w.mT).clamp(min=0) + chunk_ops.ROOT).sqrt().triu(1).sum()
    return others, (logits - la * margin).where(own, 0).sum(1), distance


def _settled_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *others, _, chunk_size = arguments
    return _backward_op(*others, chunk_size)


def _formula(*arguments: Any) -> tuple[Tensor, ...]:
    *grads, embeddings, centers, labels, _, _, _, la, gamma, margin, regularized, _ = arguments
    values = functools.partial(_parts, labels=labels, la=la, gamma=gamma, margin=margin, regularized=regularized)
    gradients: tuple[Tensor, ...] = torch.func.vjp(values, embeddings, centers)[1](tuple(grads))
    return gradients


_soft_triple = differentiable(
    "soft_triple",
    _forward_op,
    _settled_backward,
    formula=_formula,
    vmap=one_by_one,
    outputs=5,
    kept=(0, 3, 4),
    constant=(3, 4),
)


def soft_triple(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    *,
    la: float = 20.0,
    gamma: float = 0.1,
    margin: float = 0.01,
    regularized: bool = True,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the parts of the SoftTriple loss: each row's log-sum-exp and target logit, and the centers' distances.

    .. math:: z_{ic} = \lambda (S_{ic} - \delta [c = y_i]), \quad
              S_{ic} = \sum_k \operatorname{softmax}_k(x_i^\top w_{ck} / \gamma)\, x_i^\top w_{ck}

    with unit vectors x and w, of Qian et al., "SoftTriple Loss: Deep Metric Learning Without Triplet Sampling", ICCV
    2019, equations 5 to 9. `soft_triple_loss` is made of them; they are apart so that classes may be spread over
    several calls: log-sum-exps of parts of the classes give that of all, and targets add up. The row's own class is not
    in the log-sum-exp: the small loss of a well separated row would be a difference of large numbers.

    Args:
        embeddings: Shape (B, d), of any length; float32, float64, bfloat16 or float16.
        centers: Shape (C, K, d), of any length.
        labels: int64 of shape (B,). Rows of labels that are no class from 0 to C - 1 have no target here.
        la: The paper's :math:`\lambda`.
        gamma: The paper's :math:`\gamma`, above 0.
        margin: The paper's :math:`\delta`, taken from the target's similarity.
        regularized: If False, the sum of distances is 0.
        chunk_size: Classes at a time, of each thread on the CPU; default as caches hold. Of the logits, only those of
            a chunk are ever in memory.

    Returns:
        :math:`\log \sum_{c \ne y_i} \exp z_{ic}` and :math:`z_{i y_i}` or 0, of shape (B,), and the sum of
        :math:`\sqrt{2 + 10^{-5} - 2 w_{cj}^\top w_{ck}}` over classes and pairs j < k, of shape (); float32, or float64
        where an argument is.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or numbers do not fit.

    Example:
        >>> import torch
        >>> from paper_layers.ops.soft_triple.loss import soft_triple
        >>> others, target, _ = soft_triple(torch.randn(8, 64), torch.randn(100, 10, 64), torch.arange(8))
        >>> others.shape
        torch.Size([8])
    """
    size = check(embeddings, centers, la, gamma, chunk_size)
    labels = values.integers("labels", labels, embeddings.shape[0])
    checks.same_device("labels", labels, "embeddings", embeddings)
    margin = checks.number("margin", margin)
    options = (float(la), float(gamma), float(margin), bool(regularized), size)
    others, target, distance, *_ = _soft_triple(embeddings, centers, labels, options)
    return others, target, distance


@leaf
def soft_triple_loss(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    *,
    la: float = 20.0,
    gamma: float = 0.1,
    tau: float = 0.2,
    margin: float = 0.01,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Pull embeddings to the nearest of several centers of their class: the SoftTriple loss.

    .. math:: \frac1B \sum_i -\log \frac{e^{\lambda (S_{i y_i} - \delta)}}
              {e^{\lambda (S_{i y_i} - \delta)} + \sum_{c \ne y_i} e^{\lambda S_{ic}}}
              + \frac{\tau}{C K (K - 1)} \sum_c \sum_{j < k} \sqrt{2 + 10^{-5} - 2 w_{cj}^\top w_{ck}}, \quad
              S_{ic} = \sum_k \operatorname{softmax}_k(x_i^\top w_{ck} / \gamma)\, x_i^\top w_{ck}

    with unit vectors x and w, of Qian, Shang, Sun, Hu, Li, Jin, "SoftTriple Loss: Deep Metric Learning Without Triplet
    Sampling", ICCV 2019, equation 9. With K = 1 or ``tau=0`` there is no regulariser. Neither logits nor cosines of all
    classes are ever in memory. All sums and exponentials are in float32 at least, also under autocast.

    Args:
        embeddings: Shape (B, d), of any length; float32, float64, bfloat16 or float16. One shorter than 1e-12 counts
            as zero: its cosines are 0 and it has no gradient; so for centers. One with NaN or infinity makes its row's
            loss NaN unless that is ignored, and in either case the gradients of all centers.
        centers: K centers for each class, of shape (C, K, d), of any length.
        labels: Classes, integers of shape (B,).
        la: The paper's :math:`\lambda`, the scale of the logits.
        gamma: The paper's :math:`\gamma`, above 0: the smaller, the more the nearest center counts.
        tau: The paper's :math:`\tau`, the weight of the regulariser, which merges centers.
        margin: The paper's :math:`\delta`.
        ignore_index: A label whose rows do not count.
        reduction: "mean" of the rows that count, "sum" of them with the regulariser once, or "none". Then each row has
            the regulariser, so that the mean of those that count is "mean"; the others are 0.
        chunk_size: Classes at a time, of each thread on the CPU; default as caches hold.
        weights: Factors of the rows' losses, but not of the regulariser, shape (B,); "mean" still divides by the number
            of rows that count.

    Returns:
        The loss, of shape () or (B,); float32, or float64 where an argument is. Without rows that count it is 0, and so
        are all gradients.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or numbers do not fit, or a label is out of range (on CUDA, as in torch's own
            indexing, that stops the device's work with an assertion).

    Example:
        >>> import torch, paper_layers
        >>> centers = torch.randn(100, 10, 64, requires_grad=True)
        >>> loss = paper_layers.soft_triple_loss(torch.randn(8, 64), centers, torch.arange(8))
        >>> loss.backward()
    """
    size = check(embeddings, centers, la, gamma, chunk_size)
    margin = checks.number("margin", margin)
    tau = checks.number("tau", tau)
    if not tau >= 0:
        raise ValueError(f"tau: expected at least 0, got {tau!r}")
    checks.choice("reduction", reduction, REDUCTIONS)
    ignore_index = checks.integer("ignore_index", ignore_index, -(2**63))
    labels = values.integers("labels", labels, embeddings.shape[0])
    checks.same_device("labels", labels, "embeddings", embeddings)
    if weights is not None:
        checks.floating("weights", weights)
        checks.same_device("weights", weights, "embeddings", embeddings)
        checks.shape("weights", weights, tuple(labels.shape))
    classes, count, _ = centers.shape
    labels = chunk_ops.known_labels(labels, classes, ignore_index)
    regularized = tau > 0 and count > 1
    options = (float(la), float(gamma), float(margin), regularized, size)
    others, target, distance, *_ = _soft_triple(embeddings, centers, labels, options)

    regulariser = tau / (classes * count * (count - 1)) if regularized else 0.0
    parts = (others, target, distance, labels)
    return reduce_rows(*parts, regulariser=regulariser, reduction=reduction, weights=weights)
