"""The penalty on the discriminator's slope."""

from __future__ import annotations

import torch
from torch import Tensor

from paper_layers.big_bigan.scores import Scores


def r1_penalty(scores: Scores, images: Tensor) -> Tensor:
    r"""The mean squared slope of the scores at the images, through the trunk and J, to be added to the loss.

    .. math:: R = E[\lVert \nabla_x (s_x + s_{xz}) \rVert^2]

    R1 of Mescheder, Geiger, Nowozin, "Which Training Methods for GANs do actually Converge?", ICML 2018, with real
    images, and R2 with fake ones; they multiply it by :math:`\gamma / 2`. Its gradient is a second derivative, which
    `torch.compile` has not.

    Args:
        scores: What the discriminator made of `images`.
        images: N images that required gradients when it did.

    Returns:
        One number, with a graph behind it.

    Raises:
        ValueError: `images` does not require gradients, or no score depends on it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers.big_bigan import BigBiGANDiscriminator, r1_penalty
        >>> discriminator = BigBiGANDiscriminator(nn.Conv2d(3, 32, 3), feature_dim=32, latent_dim=16, width=64)
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
