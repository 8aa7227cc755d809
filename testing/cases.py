"""Cases that the tests of the ops draw, and the tolerances by dtype."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

# Relative and absolute tolerance by dtype, for values of about one. Half types round once at the end.
TOLERANCE = {
    torch.float64: (1e-11, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2e-2, 2e-2),
    torch.float16: (2e-3, 2e-3),
}
DTYPES = list(TOLERANCE)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
drawn = settings(
    max_examples=int(os.environ.get("PAPER_LAYERS_EXAMPLES", "40")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)


def on_device(argument: Any, device: str) -> Any:
    """Return the same argument, or arguments, on a device, with the same strides and offset."""
    if isinstance(argument, dict):
        return {name: on_device(a, device) for name, a in argument.items()}
    if isinstance(argument, (list, tuple)):
        return type(argument)(on_device(a, device) for a in argument)
    if not isinstance(argument, Tensor) or argument.device.type == device:
        return argument
    whole = argument.as_strided((argument.untyped_storage().nbytes() // argument.element_size(),), (1,), 0)
    return whole.to(device).as_strided(argument.shape, argument.stride(), argument.storage_offset())


@dataclass
class Case:
    """Differentiable tensors and the other arguments of one call."""

    tensors: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        return Case(tuple(t.to(dtype) for t in self.tensors), self.options)

    def on(self, device: str) -> Case:
        return Case(on_device(self.tensors, device), on_device(self.options, device))

    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(t.detach().requires_grad_() for t in self.tensors)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Equal to a float64 result within the dtype's tolerance; NaN and infinities in the same places."""
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double(), expected, rtol=rtol, atol=atol * scale, equal_nan=True, check_stride=False
    )
