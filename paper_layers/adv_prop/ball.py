"""The images that an attack may reach: those within eps grey levels of the clean one, and in the valid range."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paper_layers._core.checks import floating, number

LEVELS = 255  # From black to white.

Values = float | Sequence[float] | Tensor  # One number, or one for each channel.


class Ball:
    """The L-infinity ball around each image, cut to the valid range, and steps within it.

    Args:
        x: Images (N, C, ...).
        eps: Radius, in grey levels.
        step_size: Length of a step, in grey levels.
        bounds: The values of black and white.
        mean: What was subtracted from images in [0, 1], in place of bounds.
        std: What they were divided by then.
    """

    def __init__(
        self,
        x: Tensor,
        eps: float,
        step_size: float,
        bounds: tuple[Values, Values] | None,
        mean: Values | None,
        std: Values | None,
    ):
        floating("x", x)
        if x.dim() < 2:
            raise ValueError(f"x: expected shape (N, C, ...), got {tuple(x.shape)}")
        for name, value in (("eps", eps), ("step_size", step_size)):
            number(name, value)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected at least 0 grey levels, got {value}")
        # Half types resolve about a level: the arithmetic is in float32.
        self.clean = x.detach().clone() if x.dtype == torch.float64 else x.detach().float().clone()
        low, high = _range(self.clean, bounds, mean, std)
        level = (high - low) / LEVELS
        if bool(((self.clean < low - level) | (self.clean > high + level)).any()):
            raise ValueError(
                f"x: expected values within the valid range, {_text(low)} to {_text(high)} by bounds or mean and std, "
                f"got {x.min().item():.4g} to {x.max().item():.4g}"
            )
        self.radius, self.step = eps * level, step_size * level
        # A clean image a little outside the range is still reached, with eps = 0 alone.
        self.lower = torch.maximum(self.clean - self.radius, torch.minimum(low, self.clean))
        self.upper = torch.minimum(self.clean + self.radius, torch.maximum(high, self.clean))

    def start(self, probability: float, generator: torch.Generator | None) -> Tensor:
        """For each image by itself: with this probability a random image of the whole ball, else the clean one."""
        device = self.clean.device if generator is None else generator.device
        chosen = torch.rand(len(self.clean), generator=generator, device=device) < probability
        noise = torch.empty(self.clean.shape, dtype=self.clean.dtype, device=device)
        noise = noise.uniform_(-1, 1, generator=generator) * chosen.view(-1, *[1] * (noise.dim() - 1))
        return self._inside(self.clean + self.radius * noise.to(self.clean.device))

    def moved(self, x: Tensor, grad: Tensor, direction: int) -> Tensor:
        """A step along the gradient's sign; where there is none (half types overflow), it stays."""
        return self._inside(x + direction * self.step * grad.sign().nan_to_num(0))

    def _inside(self, x: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(x, self.upper), self.lower)


def _range(
    x: Tensor, bounds: tuple[Values, Values] | None, mean: Values | None, std: Values | None
) -> tuple[Tensor, Tensor]:
    """The values of black and white."""
    given = [name for name, value in (("bounds", bounds), ("mean", mean), ("std", std)) if value is not None]
    if given not in (["bounds"], ["mean", "std"]):
        raise ValueError(
            "bounds, mean, std: expected bounds alone, or mean and std, as they tell how long a grey level is, "
            f"got {', '.join(given) or 'none of them'}"
        )
    if bounds is not None:
        if not isinstance(bounds, tuple | list) or len(bounds) != 2:
            raise TypeError(f"bounds: expected a pair, the values of black and of white, got {bounds!r}")
        low, high = (_by_channel("bounds", value, x) for value in bounds)
        if not bool((low < high).all()):
            raise ValueError(f"bounds: expected the value of black below that of white, got {bounds!r}")
        return low, high
    mean, std = _by_channel("mean", mean, x), _by_channel("std", std, x)
    if not bool((std > 0).all()):
        raise ValueError(f"std: expected values above 0, got {_text(std)}")
    return -mean / std, (1 - mean) / std


def _by_channel(name: str, values: Values | None, x: Tensor) -> Tensor:
    try:
        tensor = torch.as_tensor(values, dtype=x.dtype, device=x.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a number, or one for each channel, got {values!r}") from error
    if tensor.dim() and tensor.numel() not in (1, x.shape[1]):
        raise ValueError(f"{name}: expected a number, or one for each of {x.shape[1]} channels, got {tensor.numel()}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got {_text(tensor)}")
    return tensor.reshape(-1, *[1] * (x.dim() - 2))


def _text(values: Tensor) -> str:
    numbers = [f"{value:.4g}" for value in values.flatten().tolist()]
    return numbers[0] if len(numbers) == 1 else f"({', '.join(numbers)})"
