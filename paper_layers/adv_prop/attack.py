"""Projected gradient descent: change images by a few grey levels so that a model errs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paper_layers._core import checks, values
from paper_layers.adv_prop._ball import Ball, Values
from paper_layers.adv_prop.norm import SplitBatchNorm
from paper_layers.adv_prop.split import use_split

_SCALE = 256  # Factor of the loss, against underflow of float16 gradients; only their sign is used.


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    radius: float = 4,
    step_size: float = 1,
    steps: int = 5,
    targeted: bool = True,
    random_start: float = 1.0,
    bounds: tuple[Values, Values] | None = None,
    mean: Values | None = None,
    std: Values | None = None,
    split: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return adversarial images by projected gradient descent, the attack that AdvProp trains on.

    For Xie, Tan, Gong, Wang, Yuille, Le, "Adversarial Examples Improve Image Recognition", CVPR 2020, after Madry,
    Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018. With
    the loss L = cross_entropy(model(x), target) and a random wrong class as each image's target, a step is
    ``x <- clip(x - step_size * sign(dL / dx))``. Untargeted, the target is the label and the sign is plus. The
    start and every step are clipped to `radius` around the clean image and to the valid range, channel by channel.

    `radius` and `step_size` are in grey levels of 8-bit images, however the images are scaled. So give either `bounds`,
    the values of black and white, such as (0, 1), (-1, 1) or (0, 255), or the `mean` and `std` that normalized images
    in [0, 1].

    The model runs in evaluation mode, its split norms through an auxiliary norm. Afterwards its modes, buffers,
    gradients and `requires_grad` are as before; no parameter gets a gradient. A DistributedDataParallel is replaced by
    the module in it. Autocast and `torch.no_grad()` around the call are fine.

    Args:
        model: Returns logits (N, classes).
        images: Images (N, C, ...), in one of float32, float64, bfloat16, float16.
        labels: True classes (N,), integers.
        radius: Largest change of a pixel, in grey levels.
        step_size: Change of a pixel by one step, in grey levels.
        steps: Number of steps. Each is one forward and one backward to the images.
        targeted: If True, move towards a random wrong class, as the paper does; if False, away from the label.
        random_start: Probability that an image starts at a random point of its ball, not at the clean image.
        bounds: Values of black and white, each a number or one per channel.
        mean: A number, or one per channel.
        std: A number, or one per channel.
        split: The split to attack, 0 for the main norms. Default: the last.
        generator: Source of the random starts and targets.

    Returns:
        Images of the same shape and dtype, detached.

    Raises:
        TypeError: An argument has a wrong type or dtype, or the model does not return a tensor.
        ValueError: A number is negative; `bounds` is reversed or missing; `images` are outside the bounds (which
            are probably not the bounds of their normalization); a label is out of range; the model has fewer than two
            classes, or too few splits.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers.adv_prop import pgd
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
        >>> images, labels = torch.rand(4, 3, 8, 8), torch.tensor([3, 1, 4, 1])
        >>> adversarial = pgd(model, images, labels, radius=4, step_size=1, steps=5, bounds=(0, 1))
        >>> bool((adversarial - images).abs().max() <= 4.001 / 255)
        True
    """
    checks.integer("steps", steps, 0)
    ball = Ball(images, radius, step_size, bounds, mean, std)
    labels = values.integers("labels", labels, len(images))
    checks.same_device("labels", labels, "images", images)
    if not isinstance(random_start, bool):
        checks.probability("random_start", random_start)
    if isinstance(model, DistributedDataParallel):  # It takes every forward for a training step.
        model = model.module
    target = None
    with torch.inference_mode(False), torch.enable_grad(), _evaluating(model), _through(model, split):
        adversarial = ball.start(random_start, generator)
        for _ in range(steps):
            adversarial.requires_grad_()
            logits = model(adversarial.to(images.dtype))
            if target is None:
                _check_classes(logits, labels)
                # Clone: autograd can't save labels that were made in inference mode.
                target = _wrong_classes(labels, logits.shape[1], generator) if targeted else labels.clone()
            loss = _SCALE * F.cross_entropy(logits.to(adversarial.dtype), target, reduction="sum")
            (grad,) = torch.autograd.grad(loss, adversarial)
            adversarial = ball.moved(adversarial.detach(), grad, -1 if targeted else 1)
        return adversarial.to(images.dtype)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # One by one: some may have been frozen.
            module.training = training


def _through(model: nn.Module, split: int | None) -> contextlib.AbstractContextManager[None]:
    counts = [module.num_splits for module in model.modules() if isinstance(module, SplitBatchNorm)]
    if not counts and split is None:
        return contextlib.nullcontext()
    return use_split(model, min(counts) - 1 if split is None else split)


def _check_classes(logits: Any, labels: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: expected logits as a Tensor, got {type(logits).__name__}; wrap it in a module")
    checks.shape("model's logits", logits, (len(labels), "classes"))
    if logits.shape[1] < 2:
        raise ValueError(f"model: expected at least 2 classes, got logits of shape {tuple(logits.shape)}")
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        got = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels: expected classes from 0 to {logits.shape[1] - 1}, got {got}")


def _wrong_classes(labels: Tensor, classes: int, generator: torch.Generator | None) -> Tensor:
    """Draw another class for each label, all equally likely."""
    device = labels.device if generator is None else generator.device
    shift = torch.randint(1, classes, labels.shape, generator=generator, device=device)
    return (labels + shift.to(labels.device)) % classes
