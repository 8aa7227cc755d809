"""Fast AdvProp: attack a fifth of each batch with one gradient step that training computes anyway."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core import values
from paper_layers.adv_prop._ball import Ball, Values
from paper_layers.adv_prop._outputs import Criterion, output_loss, split_output, training_norms
from paper_layers.adv_prop.norm import SplitBatchNorm
from paper_layers.adv_prop.split import use_split

_WEIGHT = 0.5  # Weight of the noisy images' loss, and of the attacked images' loss.


def fast_adv_prop_backward(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    radius: float = 1,
    step_size: float = 1,
    bounds: tuple[Values, Values] | None = None,
    mean: Values | None = None,
    std: Values | None = None,
    criterion: Criterion = F.cross_entropy,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Run the forwards and backwards of one training step of Fast AdvProp, which costs 1.2 plain steps.

    For Mei, Han, Bai, Zhang, Li, Li, Yuille, Xie, "Fast AdvProp", ICLR 2022, as its authors' code computes it. The
    norms split a batch of N images into clean images and n images to attack, the last ones. With each image's loss L:

    1. The attacked images get uniform noise, the whole batch runs through the split norms, and the gradient of
       ``(sum L(clean) + 0.5 * sum L(noisy)) / N`` is taken to parameters and images at once.
    2. The gradient to the images is the attack: ``adversarial = clip(noisy + step_size * sign(gradient))``.
    3. The adversarial images run through the auxiliary norms, in training mode too, and the gradient of
       ``0.5 * sum L(adversarial) / N`` is added.

    Gradients of the norms' own parameters are means over their own images, N - n or n, not N. In a batch that is too
    small for the split, such as the last of an epoch, all images are clean, or all are attacked.

    This function calls backward itself: call ``optimizer.step()`` next.

    Args:
        model: In training mode, with norms that ``swap.split_batch_norm(model, split_sizes=(0.8, 0.2))`` has split.
        images: Images (N, C, ...).
        labels: One label per image, for the criterion; integers become int64.
        radius: Largest change of a pixel, in grey levels; see `pgd` for this and for `bounds`, `mean` and `std`.
        step_size: Change of a pixel by the step, in grey levels.
        bounds: Values of black and white.
        mean: A number, or one per channel.
        std: A number, or one per channel.
        criterion: ``criterion(logits, labels)``, a mean over images.
        backward: Called with each of the two losses, as in ``lambda loss: scaler.scale(loss).backward()``.
        generator: Source of the noise.

    Returns:
        The sum of both losses, detached. The gradients are added to the parameters' `grad`.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: The model is in evaluation mode, or its norms do not all split a batch in the same two; a number is
            negative; `bounds` is reversed or missing, or `images` are outside.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers import swap
        >>> from paper_layers.adv_prop import fast_adv_prop_backward
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> model = swap.split_batch_norm(model, split_sizes=(0.8, 0.2))
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> for images, labels in [(torch.rand(10, 3, 8, 8), torch.randint(10, (10,)))]:
        ...     optimizer.zero_grad()
        ...     loss = fast_adv_prop_backward(model, images, labels, bounds=(0, 1))
        ...     optimizer.step()
    """
    labels = values.widened(labels)
    norms = training_norms(model)
    sizes = norms[0].sizes(len(images))
    for norm in norms:
        if len(sizes) != 2 or norm.sizes(len(images)) != sizes:
            raise ValueError(f"model: expected norms that split a batch in the same two, got {sizes} and {norm}")
    clean, attacked = sizes
    ball = Ball(images[clean:], radius, step_size, bounds, mean, std)
    noisy = ball.start(1, generator).requires_grad_()

    def differentiate(loss: Tensor) -> None:
        with torch.autocast(images.device.type, enabled=False):
            backward(loss)

    with _rescaled(norms, [len(images) / max(size, 1) for size in sizes]):
        outputs = split_output(model(torch.cat([images[:clean], noisy.to(images.dtype)])), sizes)
        losses = [
            weight * size * output_loss(output, own, criterion)
            for weight, size, output, own in zip((1, _WEIGHT), sizes, outputs, labels.split(sizes), strict=True)
            if size  # The mean over no images is NaN.
        ]
        first = torch.stack(losses).sum() / len(images)
        differentiate(first)
        if not attacked:
            return first.detach()
        assert noisy.grad is not None
        adversarial = ball.moved(noisy.detach(), noisy.grad, 1).to(images.dtype)
        with use_split(model, 1):
            loss = _WEIGHT * attacked * output_loss(model(adversarial), labels[clean:], criterion)
        # DistributedDataParallel waits for a gradient of every parameter.
        nothing = sum(0 * parameter.sum() for norm in norms for parameter in norm.parameters(recurse=False))
        second = loss / len(images) + nothing
        differentiate(second)
    return (first + second).detach()


@contextlib.contextmanager
def _rescaled(norms: list[SplitBatchNorm], factors: list[float]) -> Iterator[None]:
    """Multiply the gradients of each split's own parameters by its factor before they are added up."""
    hooks = [
        parameter.register_hook(functools.partial(torch.mul, other=factor))
        for norm in norms
        for one, factor in zip(norm.split_norms, factors, strict=True)
        for parameter in one.parameters(recurse=False)
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
