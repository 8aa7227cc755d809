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


@dataclass
class Case:
    """Differentiable tensors and the other arguments of one call."""

    tensors: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        return Case(tuple(t.to(dtype) for t in self.tensors), self.options)

    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(t.detach().requires_grad_() for t in self.tensors)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Equal to a float64 result within the dtype's tolerance; NaN and infinities in the same places."""
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double(), expected, rtol=rtol, atol=atol * scale, equal_nan=True, check_stride=False
    )
