"""The images that an attack may reach: within `radius` grey levels of the clean image and in the valid range."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paper_layers._core import checks

LEVELS = 255  # From black to white.

Values = float | Sequence[float] | Tensor  # One number, or one per channel.


class Ball:
    """The L-infinity ball around each image, cut to the valid range. See `pgd` for the arguments."""

    def __init__(
        self,
        images: Tensor,
        radius: float,
        step_size: float,
        bounds: tuple[Values, Values] | None,
        mean: Values | None,
        std: Values | None,
    ):
        checks.floating("images", images)
        checks.shape("images", images, ("N", "C", "..."))
        for name, value in (("radius", radius), ("step_size", step_size)):
            checks.number(name, value)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected at least 0 grey levels, got {value}")
        # Half precision resolves only about one grey level, so compute in float32.
        self.clean = images.detach().to(torch.promote_types(images.dtype, torch.float32), copy=True)
        low, high = _range(self.clean, bounds, mean, std)
        level = (high - low) / LEVELS
        if bool(((self.clean < low - level) | (self.clean > high + level)).any()):
            raise ValueError(
                f"images: expected values within the valid range, {_text(low)} to {_text(high)} by bounds or mean and "
                f"std, got {images.min().item():.4g} to {images.max().item():.4g}"
            )
        self.radius, self.step = radius * level, step_size * level
        # An image slightly outside the range must stay reachable, even with radius = 0.
        self.lower = torch.maximum(self.clean - self.radius, torch.minimum(low, self.clean))
        self.upper = torch.minimum(self.clean + self.radius, torch.maximum(high, self.clean))

    def start(self, probability: float, generator: torch.Generator | None) -> Tensor:
        """Draw each image's start: with this probability uniformly from the ball, else the clean image."""
        device = self.clean.device if generator is None else generator.device
        chosen = torch.rand(len(self.clean), generator=generator, device=device) < probability
        noise = torch.empty(self.clean.shape, dtype=self.clean.dtype, device=device)
        noise = noise.uniform_(-1, 1, generator=generator) * chosen.view(-1, *[1] * (noise.dim() - 1))
        return self._inside(self.clean + self.radius * noise.to(self.clean.device))

    def moved(self, images: Tensor, grad: Tensor, direction: int) -> Tensor:
        """Step along the gradient's sign. A NaN, where a half type overflowed, does not move its pixel."""
        return self._inside(images + direction * self.step * grad.sign().nan_to_num(0))

    def _inside(self, images: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(images, self.upper), self.lower)


def _range(
    images: Tensor, bounds: tuple[Values, Values] | None, mean: Values | None, std: Values | None
) -> tuple[Tensor, Tensor]:
    """Return the values of black and white."""
    given = [name for name, value in (("bounds", bounds), ("mean", mean), ("std", std)) if value is not None]
    if given not in (["bounds"], ["mean", "std"]):
        raise ValueError(
            "bounds, mean, std: expected bounds alone, or mean and std, since they define a grey level, "
            f"got {', '.join(given) or 'none of them'}"
        )
    if bounds is not None:
        if not isinstance(bounds, tuple | list) or len(bounds) != 2:
            raise TypeError(f"bounds: expected a pair, the values of black and of white, got {bounds!r}")
        low, high = (_by_channel("bounds", value, images) for value in bounds)
        if not bool((low < high).all()):
            raise ValueError(f"bounds: expected the value of black below that of white, got {bounds!r}")
        return low, high
    mean, std = _by_channel("mean", mean, images), _by_channel("std", std, images)
    if not bool((std > 0).all()):
        raise ValueError(f"std: expected values above 0, got {_text(std)}")
    return -mean / std, (1 - mean) / std


def _by_channel(name: str, values: Values | None, images: Tensor) -> Tensor:
    try:
        tensor = torch.as_tensor(values, dtype=images.dtype, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a number, or one per channel, got {values!r}") from error
    if tensor.dim() and tensor.numel() not in (1, images.shape[1]):
        raise ValueError(
            f"{name}: expected a number, or one for each of {images.shape[1]} channels, got {tensor.numel()}"
        )
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got {_text(tensor)}")
    return tensor.reshape(-1, *[1] * (images.dim() - 2))


def _text(values: Tensor) -> str:
    numbers = [f"{value:.4g}" for value in values.flatten().tolist()]
    return numbers[0] if len(numbers) == 1 else f"({', '.join(numbers)})"
