"""Features for a linear classifier on a frozen encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers._core import checks


def bn_crelu(features: Tensor, mean: Tensor | None = None, var: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    r"""Normalize each channel, and keep positive and negative parts apart: BN+CReLU.

    .. math:: a = (x - \mathrm{mean}) / \sqrt{\mathrm{var} + \epsilon}, \quad y = [\mathrm{relu}(a), \mathrm{relu}(-a)]

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019, for the encoder's last
    activations. It has no parameters.

    Args:
        features: Shape (N, C) or (N, C, ...).
        mean: Shape (C,), for example the mean over all training images; default: the mean of `features`.
        var: Shape (C,), without Bessel's correction; default: the variance of `features`. Give both or neither.
        eps: Added to the variance.

    Returns:
        Shape (N, 2 C) or (N, 2 C, ...).

    Raises:
        TypeError: `features` is not a floating-point tensor.
        ValueError: Only one of `mean` and `var` is given, or a shape is wrong.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import bn_crelu
        >>> bn_crelu(torch.randn(8, 32)).shape
        torch.Size([8, 64])
    """
    checks.floating("features", features)
    checks.shape("features", features, ("N", "C", "..."))
    if (mean is None) != (var is None):
        raise ValueError(f"{'mean' if mean is None else 'var'}: expected both mean and var or neither, got None")
    if mean is not None and var is not None:
        checks.shape("mean", mean, (features.shape[1],))
        checks.shape("var", var, (features.shape[1],))
    normalized = F.batch_norm(features, mean, var, training=mean is None, eps=eps)
    return torch.cat([F.relu(normalized), F.relu(-normalized)], 1)
