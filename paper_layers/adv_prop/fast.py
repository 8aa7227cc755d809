"""Fast AdvProp: a fifth of the images, attacked by one step that training takes anyway."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core import values
from paper_layers.adv_prop.ball import Ball, Values
from paper_layers.adv_prop.branch import branch
from paper_layers.adv_prop.norm import SplitBatchNorm
from paper_layers.adv_prop.step import Criterion, loss_of, split_norms, split_output

_WEIGHT = 0.5  # Of an image's loss with noise, and of its loss when attacked.


def fast_adv_prop_backward(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 1,
    step_size: float = 1,
    *,
    bounds: tuple[Values, Values] | None = None,
    mean: Values | None = None,
    std: Values | None = None,
    criterion: Criterion = F.cross_entropy,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Forwards and backwards of one training step of Fast AdvProp, which costs 1.2 times a plain one.

    For Mei, Han, Bai, Zhang, Li, Li, Yuille, Xie, "Fast AdvProp", ICLR 2022, as its authors' code computes it. Clean
    and attacked images are not the same ones: of N images the last n, as the norms split them, are attacked, the others
    stay clean. With a loss L of each image:

    1. The batch with uniform noise on the last n images goes through the split norms, and the gradient of
       ``(sum L(clean) + 0.5 * sum L(noisy)) / N`` to parameters and images is taken at once.
    2. The images' part of it is the attack: ``adversarial = clip(noisy + step_size * sign(gradient))``.
    3. They go through the auxiliary norms, in training mode as well, and the gradient of
       ``0.5 * sum L(adversarial) / N`` is added.

    Gradients of the norms' own parameters are means over their own images, N - n and n, in place of N. A batch that
    is too small for the split, as the last of an epoch may be, has clean images alone, or attacked ones.

    Args:
        model: In training mode, with norms that ``swap.split_batch_norm(model, split_sizes=(0.8, 0.2))`` has split.
        x: Images (N, C, ...).
        y: Labels, as the criterion takes them, one for each image; integers become int64.
        eps: Largest change of a pixel, in grey levels: see `pgd`, as of `bounds`, `mean` and `std`.
        step_size: Change of a pixel by the step, in grey levels.
        bounds: Values of black and white.
        mean: A number, or one for each channel.
        std: A number, or one for each channel.
        criterion: ``criterion(logits, y)``, a mean over images.
        backward: What to call with each of the two losses, as in ``lambda loss: scaler.scale(loss).backward()``.
        generator: For the noise.

    Returns:
        The sum of both losses, detached. Gradients are added to those of the parameters, as by any backward.

    Raises:
        TypeError: Arguments of wrong type or dtype.
        ValueError: The model is in evaluation mode, or its norms are not split in two and alike; numbers below 0;
            bounds reversed, not given, or not those of x.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers import swap
        >>> from paper_layers.adv_prop import fast_adv_prop_backward
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> model = swap.split_batch_norm(model, split_sizes=(0.8, 0.2))
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> for x, y in [(torch.rand(10, 3, 8, 8), torch.randint(10, (10,)))]:
        ...     optimizer.zero_grad()
        ...     loss = fast_adv_prop_backward(model, x, y, bounds=(0, 1))
        ...     optimizer.step()
    """
    y = values.widened(y)
    norms = split_norms(model)
    sizes = norms[0].sizes(len(x))
    for norm in norms:
        if len(sizes) != 2 or norm.sizes(len(x)) != sizes:
            raise ValueError(f"model: expected norms that split a batch in the same two parts, got {sizes} and {norm}")
    clean, attacked = sizes
    ball = Ball(x[clean:], eps, step_size, bounds, mean, std)
    noisy = ball.start(1, generator).requires_grad_()

    def differentiate(loss: Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            backward(loss)

    with _rescaled(norms, [len(x) / max(size, 1) for size in sizes]):
        parts = split_output(model(torch.cat([x[:clean], noisy.to(x.dtype)])), sizes)
        losses = [
            weight * size * loss_of(part, labels, criterion)
            for weight, size, part, labels in zip((1, _WEIGHT), sizes, parts, y.split(sizes), strict=True)
            if size  # The mean over no images is NaN.
        ]
        first = torch.stack(losses).sum() / len(x)
        differentiate(first)
        if not attacked:
            return first.detach()
        assert noisy.grad is not None
        adversarial = ball.moved(noisy.detach(), noisy.grad, 1).to(x.dtype)
        with branch(model, 1):
            loss = _WEIGHT * attacked * loss_of(model(adversarial), y[clean:], criterion)
        # DistributedDataParallel waits for a gradient of every parameter.
        nothing = sum(0 * parameter.sum() for norm in norms for parameter in norm.parameters(recurse=False))
        second = loss / len(x) + nothing
        differentiate(second)
    return (first + second).detach()


@contextlib.contextmanager
def _rescaled(norms: list[SplitBatchNorm], factors: list[float]) -> Iterator[None]:
    """Multiply the gradients of each branch's own parameters by its factor before they are added up."""
    hooks = [
        parameter.register_hook(functools.partial(torch.mul, other=factor))
        for norm in norms
        for part, factor in zip(norm.branches, factors, strict=True)
        for parameter in part.parameters(recurse=False)
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
