"""Random training points where logits are uncertain: the op and the function that users call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from paper_layers._core import checks
from paper_layers._core.library import define
from paper_layers._core.tracing import leaf
from paper_layers._core.vmap import folded
from paper_layers.ops.point_sample import _sample
from paper_layers.ops.uncertain_points.uncertainty import (
    check_logits,
    most_uncertain,
    of_class,
    onnx_most_uncertain,
    uncertainty,
)


def _uncertainties(logits: Tensor, labels: Tensor | None, points: Tensor) -> Tensor:
    logits = of_class(logits, labels)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return uncertainty(_sample(points, None, [logits], None, "bilinear", "zeros").mT)


def _reference(logits: Tensor, labels: Tensor | None, points: Tensor, count: int) -> Tensor:
    return most_uncertain(_uncertainties(logits, labels, points), count)


def _decomposition(logits: Tensor, labels: Tensor | None, points: Tensor, count: int) -> Tensor:
    return onnx_most_uncertain(_uncertainties(logits, labels, points), count)


def _fake(logits: Tensor, labels: Tensor | None, points: Tensor, count: int) -> Tensor:
    return logits.new_empty((logits.shape[0], count), dtype=torch.int64)


_op = define(
    "sample_uncertain_points(Tensor logits, Tensor? labels, Tensor points, SymInt count) -> Tensor",
    _reference,
    _fake,
    decompose=_decomposition,
    vmap=folded(),
)


@leaf
def sample_uncertain_points(
    logits: Tensor,
    num_points: int,
    *,
    labels: Tensor | None = None,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw random points, most of them where a segmentation is unsure: those to train a point head on.

    The selection for training of Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as Rendering", CVPR 2020,
    section 3.1: draw :math:`k P` points uniformly, keep the :math:`\beta P` most uncertain of them, and add
    :math:`(1 - \beta) P` uniform ones. Uncertain is where the logits at the point itself, bilinearly sampled as
    `point_sample` does, are close: second best minus best, or of one class :math:`-|l|`. With one class, or labels,
    only that class is sampled.

    Args:
        logits: Maps of shape (N, C, H, W); float32, float64, bfloat16 or float16. Half types are compared in float32.
        num_points: Points P to draw in each image.
        labels: The class of each image whose logit decides, int64 of shape (N,), as for the masks of boxes. Without it
            all classes do. Where there is one class only it is that, whatever the labels.
        oversample_ratio: The paper's k, at least 1: ``int(k * P)`` candidates are drawn.
        importance_sample_ratio: The paper's β, from 0 to 1: ``int(β * P)`` of them are kept.
        generator: Random generator on the device of `logits`; default torch's own. The candidates are drawn first,
            then the uniform points.

    Returns:
        Points (x, y) in [0, 1), float32 of shape (N, P, 2): the most uncertain candidates first and of equals the one
        drawn first, then the uniform points. As in `torch.topk`, NaN comes first: where a sampled logit is NaN, or the
        two best are equal and infinite. No gradient flows.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices, numbers or ratios do not fit.

    Example:
        >>> import torch, paper_layers
        >>> coarse = torch.randn(2, 19, 64, 128)
        >>> paper_layers.sample_uncertain_points(coarse, num_points=100).shape
        torch.Size([2, 100, 2])
    """
    labels = check_logits(logits, labels)
    num_points = checks.integer("num_points", num_points, 0)
    oversample_ratio = checks.number("oversample_ratio", oversample_ratio)
    if not 1 <= oversample_ratio < math.inf:
        raise ValueError(f"oversample_ratio: expected at least 1, got {oversample_ratio}")
    importance_sample_ratio = checks.probability("importance_sample_ratio", importance_sample_ratio)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    # torch.rand does not take symbolic sizes with a generator, even if it is None.
    options: dict[str, Any] = {} if generator is None else {"generator": generator}

    def draw(count: int) -> Tensor:
        return torch.rand(logits.shape[0], count, 2, dtype=torch.float32, device=logits.device, **options)

    count = int(importance_sample_ratio * num_points)
    candidates = draw(int(oversample_ratio * num_points))
    chosen = _op(logits.detach(), labels, candidates, count)
    return torch.cat([candidates.gather(1, chosen[..., None].expand(-1, -1, 2)), draw(num_points - count)], 1)
