"""Shared by the ops on uncertain points: the uncertainty, the order of the most uncertain, the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from paper_layers._core import checks, dtypes, values


def of_class(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return each image's logits of its class, (N, 1, H, W); all logits without `labels`."""
    if labels is None:
        return logits
    return logits.gather(1, labels[:, None, None, None].expand(-1, 1, *logits.shape[2:]))


def uncertainty(logits: Tensor) -> Tensor:
    """Return second best minus best logit, (N, C, ...) -> (N, ...), or minus the magnitude of a single class."""
    logits = logits.to(dtypes.accumulation(logits))
    if logits.shape[1] == 1:
        return -logits[:, 0].abs()
    best, second = logits.topk(2, dim=1).values.unbind(1)
    return second - best


def most_uncertain(uncertainty: Tensor, count: int) -> Tensor:
    """Return the indices of each row's `count` largest in descending order: NaN first, as in topk, ties by index."""
    # Not a view, and in the layout that a kernel returns.
    return (
        uncertainty.sort(dim=1, descending=True, stable=True)
        .indices[:, :count]
        .clone(memory_format=torch.contiguous_format)
    )


def onnx_most_uncertain(uncertainty: Tensor, count: int) -> Tensor:
    """Do the same for ONNX, which has no stable sort; its TopK breaks ties by index."""
    return uncertainty.topk(min(count, uncertainty.shape[1]), dim=1).indices


def check_logits(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Check logits and labels; return the labels that the op needs."""
    checks.floating("logits", logits)
    checks.shape("logits", logits, ("N", "C", "H", "W"))
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected shape (N, C, H, W) with at least one class, got {tuple(logits.shape)}")
    if labels is None:
        return None
    labels = checks.numbers("labels", values.widened(labels))
    checks.same_device("labels", labels, "logits", logits)
    checks.shape("labels", labels, (logits.shape[0],))
    return labels if logits.shape[1] > 1 else None
