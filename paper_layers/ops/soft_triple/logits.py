"""SoftTriple's logits of all classes: the op, its backward, and the function that users call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paper_layers._core import dtypes
from paper_layers._core.differentiable import differentiable
from paper_layers._core.library import define
from paper_layers._core.vmap import one_by_one
from paper_layers.ops.soft_triple import chunk_ops
from paper_layers.ops.soft_triple.chunks import Chunks, check, product_flops, relaxed_logits


@torch.no_grad()
def _logits(embeddings: Tensor, centers: Tensor, la: float, gamma: float, chunk_size: int) -> tuple[Tensor, Tensor]:
    chunks = Chunks(embeddings, centers, chunk_size)
    logits = chunks.unit.new_empty(len(embeddings), len(centers))
    inverses = [chunks.unit.new_empty(0, centers.shape[1])]
    for classes, chunk, scores in chunks:
        inverse = chunk_ops.center_norms_and_distances(chunk, False)[0]
        torch.mul(chunk_ops.chunk_similarity(scores, inverse, gamma).mT, la, out=logits[:, classes])
        inverses.append(inverse)
    return logits, torch.cat(inverses)


def _logits_fake(embeddings: Tensor, centers: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = dtypes.accumulation(embeddings, centers)
    return (
        embeddings.new_empty(embeddings.shape[0], centers.shape[0], dtype=dtype),
        embeddings.new_empty(centers.shape[:2], dtype=dtype),
    )


@torch.no_grad()
def _logits_backward(
    grad: Tensor, embeddings: Tensor, centers: Tensor, inverse: Tensor, la: float, gamma: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    def scores_to_grads_(classes: slice, scores: Tensor) -> Tensor:
        grad_similarity = (la * grad[:, classes]).mT.contiguous()
        return chunk_ops.chunk_similarity_backward(scores, inverse[classes], grad_similarity, gamma)

    no_distance = grad.new_zeros(())
    return Chunks(embeddings, centers, chunk_size).chunked_backward(
        scores_to_grads_, inverse, grad.new_empty(0), no_distance
    )


def _logits_backward_fake(grad: Tensor, embeddings: Tensor, centers: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return embeddings.new_empty(embeddings.shape), centers.new_empty(centers.shape)


_logits_op = define(
    "soft_triple_logits(Tensor embeddings, Tensor centers, float la, float gamma, int chunk_size) -> (Tensor, Tensor)",
    _logits,
    _logits_fake,
    flops=lambda embeddings, centers, *_: product_flops(embeddings, centers),
)
_logits_backward_op = define(
    "soft_triple_logits_backward(Tensor grad, Tensor embeddings, Tensor centers, Tensor inverse, float la, "
    "float gamma, int chunk_size) -> (Tensor, Tensor)",
    _logits_backward,
    _logits_backward_fake,
    flops=lambda grad, embeddings, centers, *_: 3 * product_flops(embeddings, centers),
)


def _formula(
    grad: Tensor, embeddings: Tensor, centers: Tensor, inverse: Tensor, la: float, gamma: float, chunk_size: int
) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = torch.func.vjp(lambda x, w: relaxed_logits(x, w, la, gamma), embeddings, centers)[
        1
    ](grad)
    return gradients


_logits_of = differentiable(
    "soft_triple_logits",
    _logits_op,
    _logits_backward_op,
    formula=_formula,
    vmap=one_by_one,
    outputs=2,
    kept=(1,),
    constant=(1,),
)


def soft_triple_logits(
    embeddings: Tensor,
    centers: Tensor,
    *,
    la: float = 20.0,
    gamma: float = 0.1,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Score embeddings against all classes as SoftTriple does, without the cosines of all centers in memory.

    .. math:: \lambda \sum_k \operatorname{softmax}_k(x_i^\top w_{ck} / \gamma)\, x_i^\top w_{ck}

    The relaxed similarity of Qian et al., "SoftTriple Loss: Deep Metric Learning Without Triplet Sampling", ICCV 2019,
    equation 5, with unit vectors x and w, times :math:`\lambda`; no margin.

    Args:
        embeddings: Shape (B, d), of any length; float32, float64, bfloat16 or float16.
        centers: Shape (C, K, d), of any length.
        la: The paper's :math:`\lambda`.
        gamma: The paper's :math:`\gamma`, above 0.
        chunk_size: Classes at a time; default as caches hold.

    Returns:
        Logits of shape (B, C); float32, or float64 where an argument is.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or numbers do not fit.

    Example:
        >>> import torch
        >>> from paper_layers.ops.soft_triple.logits import soft_triple_logits
        >>> soft_triple_logits(torch.randn(8, 64), torch.randn(100, 10, 64)).shape
        torch.Size([8, 100])
    """
    size = check(embeddings, centers, la, gamma, chunk_size)
    logits, _ = _logits_of(embeddings, centers, (float(la), float(gamma), size))
    return logits
