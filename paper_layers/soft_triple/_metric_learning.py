"""The interface of pytorch-metric-learning's losses, without importing the package."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paper_layers._core import checks


def as_metric_learning_loss(kind: type) -> type:
    """Return the class, or a subclass that is also a loss of pytorch-metric-learning once that package is imported.

    Its DistributedLossWrapper checks for its own base class. The subclass inherits no behaviour from that class, as all
    attributes are found in ours first.
    """
    theirs = sys.modules.get("pytorch_metric_learning.losses.base_metric_loss_function")
    if theirs is None or not getattr(kind, "_takes_joint_batch", True):
        return kind
    base = theirs.BaseMetricLossFunction
    return kind if issubclass(kind, base) else _joined(kind, base)


@functools.cache
def _joined(kind: type, base: type) -> type:
    # Attributes that its constructor would set, which is not called.
    body: dict[str, Any] = {"collect_stats": False, "embedding_regularizer": None, "__doc__": kind.__doc__}
    body |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_made_from": kind}
    return type(kind.__name__, (kind, base), {**body, "__reduce_ex__": _reduce})


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle and copy by our class: another process may lack the joined class and its base."""
    reduced: Any = nn.Module.__reduce_ex__(self, 2)
    return _rebuild, (self._made_from,), *reduced[2:]


def _rebuild(kind: Any) -> Any:
    return kind.__new__(kind)


def check_references(embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None) -> None:
    """Check that reference rows, which losses of pairs take, are None or the rows themselves."""
    for name, value, own in (("ref_emb", ref_emb, embeddings), ("ref_labels", ref_labels, labels)):
        if value is not None and value is not own:
            raise ValueError(f"{name}: expected None, since SoftTriple compares with centers, got a Tensor")


def count_rows(indices_tuple: Sequence[Tensor], embeddings: Tensor) -> Tensor:
    """Count how often each row occurs in a miner's pairs or triplets: float32 of shape (B,)."""
    if not isinstance(indices_tuple, tuple | list) or not all(isinstance(part, Tensor) for part in indices_tuple):
        raise TypeError(f"indices_tuple: expected Tensors in a tuple, got {type(indices_tuple).__name__}")
    counts = embeddings.new_zeros(len(embeddings), dtype=torch.float32)
    for part in indices_tuple:
        counts = counts.index_add(0, checks.numbers("indices_tuple", part), counts.new_ones(len(part)))
    return counts


def counts_to_weights(counts: Tensor) -> Tensor:
    """Divide counts by the largest; return ones if all are zero."""
    if counts.shape[0] == 0:
        return counts
    largest = counts.max()
    return torch.where(largest > 0, counts / largest.clamp(min=1), 1)
