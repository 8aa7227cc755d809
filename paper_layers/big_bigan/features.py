"""Features for a linear classifier on a frozen encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers._core import checks


def bn_crelu(features: Tensor, mean: Tensor | None = None, var: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    r"""Normalize each channel, and keep positive and negative parts apart: BN+CReLU.

    .. math:: a = (x - \mathrm{mean}) / \sqrt{\mathrm{var} + \epsilon}, \quad y = [\mathrm{relu}(a), \mathrm{relu}(-a)]

    Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019, for the encoder's last
    activations. There are no parameters.

    Args:
        features: Of shape (N, C) or (N, C, ...).
        mean: Of shape (C,), say of all training images; default that of `features`.
        var: Of shape (C,), without Bessel's correction; default that of `features`. Both or neither.
        eps: Added to the variance.

    Returns:
        Of shape (N, 2 C) or (N, 2 C, ...).

    Raises:
        TypeError: `features` is no tensor of floating numbers.
        ValueError: One of `mean` and `var` alone, or shapes that do not fit.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import bn_crelu
        >>> bn_crelu(torch.randn(8, 32)).shape
        torch.Size([8, 64])
    """
    checks.floating("features", features)
    if features.dim() < 2:
        raise ValueError(f"features: expected shape (N, C) or (N, C, ...), got {tuple(features.shape)}")
    if (mean is None) != (var is None):
        raise ValueError(f"{'mean' if mean is None else 'var'}: expected both mean and var or neither, got None")
    for name, statistic in (("mean", mean), ("var", var)):
        if statistic is not None and statistic.shape != features.shape[1:2]:
            raise ValueError(f"{name}: expected shape ({features.shape[1]},), got {tuple(statistic.shape)}")
    normalized = F.batch_norm(features, mean, var, training=mean is None, eps=eps)
    return torch.cat([F.relu(normalized), F.relu(-normalized)], 1)
