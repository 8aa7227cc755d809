"""Parameter groups for training with SoftTriple."""

from __future__ import annotations

from typing import Any

from torch import nn

from paper_layers._core import checks
from paper_layers.soft_triple.loss import SoftTripleLoss


def param_groups(*modules: nn.Module, lr: float = 1e-4, center_lr: float = 1e-2) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: the network, and the centers of its SoftTriple losses.

    Qian et al., "SoftTriple Loss", ICCV 2019, train with Adam, a weight decay of 1e-4 and ``eps=0.01``, and multiply
    both learning rates by 0.1 every 20 of 50 epochs. The large ``eps`` matters most: the gradients of most centers are
    far below it, so their steps are proportional to the gradient. With torch's default of 1e-8 each center moves by
    `center_lr`, however small its gradient is.

    Args:
        *modules: The network and the loss, or one module that contains both.
        lr: Learning rate of all other parameters.
        center_lr: Learning rate of the centers.

    Returns:
        Two groups: the other parameters, and the centers.

    Raises:
        TypeError: A learning rate is not a number.
        ValueError: `modules` contain no SoftTriple loss.

    Example:
        >>> import torch
        >>> from paper_layers.soft_triple import SoftTripleLoss, param_groups
        >>> model, loss = torch.nn.Linear(128, 64), SoftTripleLoss(98, 64)
        >>> groups = param_groups(model, loss, lr=1e-4, center_lr=1e-2)
        >>> optimizer = torch.optim.Adam(groups, eps=0.01, weight_decay=1e-4)
        >>> [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [(2, 0.0001), (1, 0.01)]
    """
    lr = checks.number("lr", lr)
    center_lr = checks.number("center_lr", center_lr)
    losses = (part for module in modules for part in module.modules() if isinstance(part, SoftTripleLoss))
    centers = {id(loss.centers): loss.centers for loss in losses}
    if not centers:
        raise ValueError(f"modules: expected a SoftTripleLoss among them, got {', '.join(_names(modules)) or 'none'}")
    every = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    others = [parameter for name, parameter in every.items() if name not in centers]
    return [{"params": others, "lr": lr}, {"params": list(centers.values()), "lr": center_lr}]


def _names(modules: tuple[nn.Module, ...]) -> list[str]:
    return [type(module).__name__ for module in modules]
