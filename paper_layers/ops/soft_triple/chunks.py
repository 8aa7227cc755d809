"""Shared by the ops on SoftTriple's centers: the walk over chunks of classes, the formula, the checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from paper_layers._core import checks, dtypes
from paper_layers.ops.soft_triple import chunk_ops

# The default number of scores in memory: what fits the caches of a CPU, and enough work for a GPU's launches.
_CHUNK_SCORES, _CHUNK_SCORES_OF_GPUS = 1 << 20, 1 << 25


class Chunks:
    """Iterates over chunks of classes and computes their scores in one shared buffer."""

    def __init__(self, embeddings: Tensor, centers: Tensor, chunk_size: int):
        self.embeddings, self.centers = embeddings, centers
        self.dtype = dtypes.accumulation(embeddings, centers)
        wide = embeddings.to(self.dtype)
        self.inverse_length = chunk_ops.center_norms_and_distances(wide[:, None], False)[0]
        self.unit = wide * self.inverse_length
        classes, count, _ = centers.shape
        most = _CHUNK_SCORES if wide.is_cpu else _CHUNK_SCORES_OF_GPUS
        size = chunk_size or max(1, most // (count * max(1, len(wide))))
        self.ranges = [slice(first, min(first + size, classes)) for first in range(0, classes, size)]
        self._buffer = self.unit.new_empty(min(size, classes) * count, len(wide))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield the classes, their centers in the compute dtype, and their scores (classes K, B)."""
        for classes in self.ranges:
            centers = self.centers[classes].to(self.dtype).contiguous()
            rows = centers.flatten(0, 1)
            # Autocast leaves products with `out` alone.
            yield classes, centers, torch.mm(rows, self.unit.mT, out=self._buffer[: len(rows)])

    def chunked_backward(
        self,
        scores_to_grads_: Callable[[slice, Tensor], Tensor],
        inverse: Tensor,
        distance_slope: Tensor,
        grad_distance: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients. `scores_to_grads_` turns scores into their gradients and returns the projections."""
        grad_unit = torch.zeros_like(self.unit)
        grad_centers = torch.empty_like(self.centers, memory_format=torch.contiguous_format)
        for classes, centers, scores in self:
            projection = scores_to_grads_(classes, scores)
            grad_unit.addmm_(scores.mT, centers.flatten(0, 1))
            grad = grad_centers[classes].to(self.dtype)
            torch.mm(scores, self.unit, out=grad.flatten(0, 1))
            chunk_ops.accumulate_center_grad_(
                grad, centers, inverse[classes], projection, distance_slope[classes], grad_distance
            )
            if grad.dtype != grad_centers.dtype:
                grad_centers[classes] = grad
        along = (grad_unit * self.unit).sum(1, keepdim=True)
        grad_embeddings = (grad_unit - along * self.unit) * self.inverse_length
        return grad_embeddings.to(self.embeddings.dtype), grad_centers


def product_flops(embeddings: Sequence[int], centers: Sequence[int], regularized: bool = False) -> int:
    """Count the operations of the products of embeddings with centers, and of the centers of each class."""
    classes, count, channels = centers
    return 2 * classes * count * channels * (embeddings[0] + (count if regularized else 0))


def relaxed_logits(embeddings: Tensor, centers: Tensor, la: float, gamma: float) -> Tensor:
    """Return the logits (B, C) by the formula, differentiable to any order, with all B x C x K cosines."""
    dtype = dtypes.accumulation(embeddings, centers)
    x, w = (t.to(dtype) * chunk_ops.inverse_length(t.to(dtype)) for t in (embeddings, centers))
    s = torch.einsum("bd,ckd->bck", x, w)
    return la * ((s / gamma).softmax(2) * s).sum(2)


def check(embeddings: Tensor, centers: Tensor, la: float, gamma: float, chunk_size: int | None) -> int:
    """Check the arguments that all functions share; return the chunk size, 0 for the default."""
    checks.floating("embeddings", embeddings)
    checks.floating("centers", centers)
    checks.same_device("centers", centers, "embeddings", embeddings)
    checks.shape("centers", centers, ("C", "K", "d"))
    if centers.shape[1] == 0:
        raise ValueError(f"centers: expected shape (C, K, d) with K at least 1, got {tuple(centers.shape)}")
    checks.shape("embeddings", embeddings, ("B", centers.shape[2]))
    la = checks.number("la", la)
    gamma = checks.number("gamma", gamma)
    if not gamma > 0:
        raise ValueError(f"gamma: expected more than 0, got {gamma!r}")
    return 0 if chunk_size is None else checks.integer("chunk_size", chunk_size, 1)
