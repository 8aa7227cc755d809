"""Pytorch-metric-learning's interface of a loss, without importing the package."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def taken_by_metric_learning(kind: type) -> type:
    """The class itself, or a subclass that is one of pytorch-metric-learning's losses as well, once that is imported.

    Its DistributedLossWrapper asks for the class. Nothing is inherited: all attributes are found before its own.
    """
    theirs = sys.modules.get("pytorch_metric_learning.losses.base_metric_loss_function")
    if theirs is None or not getattr(kind, "_takes_joint_batch", True):
        return kind
    base = theirs.BaseMetricLossFunction
    return kind if issubclass(kind, base) else _joined(kind, base)


@functools.cache
def _joined(kind: type, base: type) -> type:
    # Attributes that its methods read; its constructor, which is not called, sets them.
    body: dict[str, Any] = {"collect_stats": False, "embedding_regularizer": None, "__doc__": kind.__doc__}
    body |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_made_from": kind}
    return type(kind.__name__, (kind, base), {**body, "__reduce_ex__": _reduce})


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle and copy by the class that there is a name for: the other may have neither name nor base elsewhere."""
    reduced: Any = nn.Module.__reduce_ex__(self, 2)
    return _rebuild, (self._made_from,), *reduced[2:]


def _rebuild(kind: Any) -> Any:
    return kind.__new__(kind)


def check_references(embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None) -> None:
    """Rows to compare with are for losses of pairs, but the rows themselves may stand there."""
    for name, value, own in (("ref_emb", ref_emb, embeddings), ("ref_labels", ref_labels, labels)):
        if value is not None and value is not own:
            raise ValueError(f"{name}: expected None, since SoftTriple compares with centers, got a Tensor")


def counts_of_tuples(indices_tuple: Sequence[Tensor], embeddings: Tensor) -> Tensor:
    """How often each row occurs in a miner's pairs or triplets: (B,), in a floating dtype."""
    if not isinstance(indices_tuple, tuple | list) or not all(isinstance(part, Tensor) for part in indices_tuple):
        raise TypeError(f"indices_tuple: expected Tensors in a tuple, got {type(indices_tuple).__name__}")
    counts = embeddings.new_zeros(len(embeddings), dtype=torch.float32)
    for part in indices_tuple:
        if part.dtype != torch.int64 or part.dim() != 1:
            raise TypeError(
                f"indices_tuple: expected int64 Tensors of one dimension, got {part.dtype} of {tuple(part.shape)}"
            )
        counts = counts.index_add(0, part, counts.new_ones(len(part)))
    return counts


def weights_of_counts(counts: Tensor) -> Tensor:
    """Counts relative to the largest, or ones where all are zero."""
    if counts.shape[0] == 0:
        return counts
    largest = counts.max()
    return torch.where(largest > 0, counts / largest.clamp(min=1), 1)
