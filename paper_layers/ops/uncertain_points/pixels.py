"""The most uncertain pixels of a map of logits: the op and the function that users call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paper_layers._core import checks
from paper_layers._core.library import define
from paper_layers._core.tracing import leaf
from paper_layers._core.vmap import folded
from paper_layers.ops.uncertain_points.uncertainty import (
    check_logits,
    most_uncertain,
    of_class,
    onnx_most_uncertain,
    uncertainty,
)


class UncertainPoints(NamedTuple):
    """Pixels, the most uncertain first.

    Attributes:
        indices: ``y * W + x``, int64 of shape (N, P).
        points: The pixels' centres (x, y) in [0, 1], float32 of shape (N, P, 2).
    """

    indices: Tensor
    points: Tensor


def _uncertainties(logits: Tensor, labels: Tensor | None) -> Tensor:
    return uncertainty(of_class(logits, labels)).flatten(1)


def _reference(logits: Tensor, labels: Tensor | None, num_points: int) -> Tensor:
    return most_uncertain(_uncertainties(logits, labels), num_points)


def _decomposition(logits: Tensor, labels: Tensor | None, num_points: int) -> Tensor:
    return onnx_most_uncertain(_uncertainties(logits, labels), num_points)


def _fake(logits: Tensor, labels: Tensor | None, num_points: int) -> Tensor:
    shape = (logits.shape[0], min(num_points, logits.shape[2] * logits.shape[3]))
    return logits.new_empty(shape, dtype=torch.int64)


_op = define(
    "uncertain_points(Tensor logits, Tensor? labels, SymInt num_points) -> Tensor",
    _reference,
    _fake,
    decompose=_decomposition,
    vmap=folded(),
)


@leaf
def uncertain_points(logits: Tensor, num_points: int, *, labels: Tensor | None = None) -> UncertainPoints:
    r"""Find the pixels that a segmentation is least sure of.

    .. math:: u_i = \max\nolimits^{(2)}_c l_{ci} - \max_c l_{ci}

    The points that each subdivision step of Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as Rendering",
    CVPR 2020, section 3.1, refines: second best minus best logit, or of one class :math:`u_i = -|l_i|`. The exact
    largest in one pass over the logits, with no map of uncertainties.

    Args:
        logits: Maps of shape (N, C, H, W); float32, float64, bfloat16 or float16. Half types are compared in float32.
        num_points: Pixels to find in each image; at most all of them are.
        labels: The class of each image whose logit decides, int64 of shape (N,), as for the masks of boxes. Without it
            all classes do. Where there is one class only it is that, whatever the labels.

    Returns:
        Indices ``y * W + x``, int64 of shape (N, P) with P = min(num_points, H * W), the most uncertain first and of
        equals the one of lower index; and the centres of these pixels (x, y) in [0, 1], float32 of shape (N, P, 2).
        As in `torch.topk`, NaN comes first: where a logit is NaN, or the two best are equal and infinite.
        No gradient flows.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or `num_points` do not fit.

    Example:
        >>> import torch, paper_layers
        >>> index, points = paper_layers.uncertain_points(torch.randn(2, 19, 64, 128), num_points=100)
        >>> index.shape, points.shape
        (torch.Size([2, 100]), torch.Size([2, 100, 2]))
    """
    labels = check_logits(logits, labels)
    num_points = checks.integer("num_points", num_points, 0)
    index = _op(logits.detach(), labels, num_points)
    height, width = logits.shape[2:]
    columns = max(width, 1)  # A map without pixels has no points, but torch refuses to divide by zero.
    x, y = index % columns, index // columns
    return UncertainPoints(
        index, torch.stack([(x.to(torch.float32) + 0.5) / width, (y.to(torch.float32) + 0.5) / height], -1)
    )
