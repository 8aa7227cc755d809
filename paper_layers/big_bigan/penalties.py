"""The penalty on the discriminator's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from paper_layers.big_bigan.scores import Scores


def r1_penalty(scores: Scores, images: Tensor) -> Tensor:
    r"""Compute the mean squared gradient of the scores with respect to the images; add it to the loss.

    .. math:: R = E[\lVert \nabla_x (s_x + s_{xz}) \rVert^2]

    Mescheder, Geiger, Nowozin, "Which Training Methods for GANs do actually Converge?", ICML 2018: R1 on real images,
    R2 on fake ones, multiplied by :math:`\gamma / 2`. Its own gradient is a second derivative, which `torch.compile`
    does not support.

    Args:
        scores: The discriminator's scores of `images`.
        images: N images, with `requires_grad` set before they were scored.

    Returns:
        A differentiable scalar.

    Raises:
        ValueError: `images` do not require gradients, or no score depends on them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers.big_bigan import BigBiGANDiscriminator, r1_penalty
        >>> discriminator = BigBiGANDiscriminator(nn.Conv2d(3, 32, 3), 32, latent_dim=16, hidden_features=64)
        >>> images = torch.randn(8, 3, 16, 16, requires_grad=True)
        >>> r1_penalty(discriminator(images, torch.randn(8, 16)), images).backward()
    """
    if not images.requires_grad:
        raise ValueError("images: expected requires_grad=True, got False")
    total = torch.stack([score.sum() for score in scores.terms.values()]).sum()
    slope = torch.autograd.grad(total, images, create_graph=True, allow_unused=True)[0] if total.requires_grad else None
    if slope is None:
        raise ValueError("scores: expected scores that depend on images, got some that do not")
    return slope.flatten(1).square().sum(1, dtype=total.dtype).mean()
