"""Projected gradient descent: images changed by a few grey levels, such that a model errs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paper_layers._core import checks, values
from paper_layers.adv_prop.ball import Ball, Values
from paper_layers.adv_prop.branch import branch as one_branch
from paper_layers.adv_prop.norm import SplitBatchNorm

_SCALE = 256  # Of the loss, so that gradients do not underflow in float16; their sign stays.


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 4,
    step_size: float = 1,
    steps: int = 5,
    *,
    targeted: bool = True,
    random_start: float = 1.0,
    bounds: tuple[Values, Values] | None = None,
    mean: Values | None = None,
    std: Values | None = None,
    branch: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial images by projected gradient descent, as AdvProp trains on.

    For Xie, Tan, Gong, Wang, Yuille, Le, "Adversarial Examples Improve Image Recognition", CVPR 2020, after Madry,
    Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018. With
    the loss L = cross_entropy(model(x'), target), where each image's target is drawn among the wrong classes,
    ``x' <- clip(x' - step_size * sign(dL / dx'))``; untargeted, the target is y and the sign is plus. Every image, the
    first as well, is clipped to `eps` around x and to the valid range, channel by channel.

    `eps` and `step_size` are in grey levels of 8-bit images, whatever x was scaled to. So x needs `bounds`, the values
    of black and white: (0, 1), (-1, 1), (0, 255); or the `mean` and `std` that images in [0, 1] were normalized with.

    The model runs in evaluation mode: split norms through an auxiliary branch, with its running statistics. Its modes,
    buffers, gradients and `requires_grad` are as before afterwards, and no gradient of a parameter is computed. Of
    DistributedDataParallel, the module inside runs. It may be called under autocast and under `torch.no_grad()`.

    Args:
        model: Answers with logits (N, classes).
        x: Images (N, C, ...), in one of float32, float64, bfloat16, float16.
        y: True classes (N,), integers.
        eps: Largest change of a pixel, in grey levels.
        step_size: Change of a pixel by a step, in grey levels.
        steps: Number of steps, each a forward and a backward to x.
        targeted: Towards a random wrong class, as in the paper; False: away from y.
        random_start: Probability, for each image by itself, of a start at a random image of the ball, else at x.
        bounds: Values of black and white, numbers or one for each channel.
        mean: A number, or one for each channel.
        std: A number, or one for each channel.
        branch: Which branch of split norms to attack, 0 for the main one. Default: the last.
        generator: For starts and targets.

    Returns:
        Images like x, detached.

    Raises:
        TypeError: Arguments of wrong type or dtype; the model's output is no tensor.
        ValueError: Numbers below 0; bounds reversed, or not given; x outside of them, which tells that they are not its
            own; labels out of range; fewer than two classes; a branch that the model lacks.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers.adv_prop import pgd
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
        >>> x, y = torch.rand(4, 3, 8, 8), torch.tensor([3, 1, 4, 1])
        >>> adversarial = pgd(model, x, y, eps=4, step_size=1, steps=5, bounds=(0, 1))
        >>> bool((adversarial - x).abs().max() <= 4.001 / 255)
        True
    """
    checks.integer("steps", steps, 0)
    ball = Ball(x, eps, step_size, bounds, mean, std)
    y = values.integers("y", y, len(x))
    checks.same_device("y", y, "x", x)
    if not isinstance(random_start, bool):
        checks.number("random_start", random_start)
    if not 0 <= random_start <= 1:
        raise ValueError(f"random_start: expected a probability from 0 to 1, got {random_start}")
    if isinstance(model, DistributedDataParallel):  # Which takes every forward for a training step.
        model = model.module
    target = None
    with torch.inference_mode(False), torch.enable_grad(), _evaluating(model), _through(model, branch):
        adversarial = ball.start(random_start, generator)
        for _ in range(steps):
            adversarial.requires_grad_()
            logits = model(adversarial.to(x.dtype))
            if target is None:
                _check_classes(logits, y)
                # Cloned, as labels made in inference mode cannot be kept for the backward.
                target = _wrong_classes(y, logits.shape[1], generator) if targeted else y.clone()
            loss = _SCALE * F.cross_entropy(logits.to(adversarial.dtype), target, reduction="sum")
            (grad,) = torch.autograd.grad(loss, adversarial)
            adversarial = ball.moved(adversarial.detach(), grad, -1 if targeted else 1)
        return adversarial.to(x.dtype)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # Each its own: some may have been frozen.
            module.training = training


def _through(model: nn.Module, branch: int | None) -> contextlib.AbstractContextManager[None]:
    splits = [module.num_splits for module in model.modules() if isinstance(module, SplitBatchNorm)]
    if not splits and branch is None:
        return contextlib.nullcontext()
    return one_branch(model, min(splits) - 1 if branch is None else branch)


def _check_classes(logits: Any, y: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: expected logits as a Tensor, got {type(logits).__name__}; wrap it in a module")
    if logits.dim() != 2 or len(logits) != len(y) or logits.shape[1] < 2:
        expected = f"({len(y)}, classes), with at least 2 classes"
        raise ValueError(f"model: expected logits of shape {expected}, got {tuple(logits.shape)}")
    if bool(((y < 0) | (y >= logits.shape[1])).any()):
        raise ValueError(f"y: expected labels from 0 to {logits.shape[1] - 1}, got {int(y.min())} to {int(y.max())}")


def _wrong_classes(y: Tensor, classes: int, generator: torch.Generator | None) -> Tensor:
    """For each label one of the others, all equally likely."""
    device = y.device if generator is None else generator.device
    return (y + torch.randint(1, classes, y.shape, generator=generator, device=device).to(y.device)) % classes
