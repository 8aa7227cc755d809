"""The CUDA kernels of sample_uncertain_points against the sum over all pixels, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paper_layers import sample_uncertain_points
from testing.cases import DTYPES, Case, by_dtype, on_device
from testing.cuda_battery import DEVICE, CudaBattery, Step, needs_cuda
from tests.ops import test_sample_uncertain_points as on_cpu
from tests.ops.test_sample_uncertain_points import between_centres, formula
from tests.ops.test_uncertain_points import maps

pytestmark = needs_cuda

op = torch.ops.paper_layers.sample_uncertain_points.default


def _check(case: Case) -> None:
    """The same points in the same order."""
    options = on_device(case.options, DEVICE)
    index = op(case.tensors[0].to(DEVICE), options.get("labels"), options["points"], options["count"])
    assert torch.equal(index.cpu(), formula(*case.tensors, **case.options))


@by_dtype
def test_many_blocks(dtype: torch.dtype) -> None:
    logits, points = (8 * maps(2, 5, 8, 16)).round().to(dtype), between_centres(2, 9000)
    for count in (1, 2000, 9000):
        _check(Case((logits,), {"points": points, "count": count}))
        _check(Case((logits,), {"points": points, "count": count, "labels": torch.tensor([4, 0])}))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 1, 1, 1)])
@pytest.mark.parametrize("num_points", [0, 1, 50])
def test_empty(shape: tuple[int, ...], num_points: int) -> None:
    points = sample_uncertain_points(maps(*shape).to(DEVICE), num_points)
    assert points.shape == (shape[0], num_points, 2)


def test_generator() -> None:
    logits = maps(2, 3, 8, 8).to(DEVICE)
    first, same, other = (
        sample_uncertain_points(logits, 30, generator=torch.Generator(DEVICE).manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


class TestSampleUncertainPointsOnDevice(CudaBattery, on_cpu.TestSampleUncertainPoints):
    op_dtypes = tuple(DTYPES)
    out_of_range = {  # noqa: RUF012
        f"label {label}": f"""
x, labels = torch.zeros(1, 3, 4, 4), torch.tensor([{label}])
torch.ops.paper_layers.sample_uncertain_points(x, labels, torch.rand(1, 9, 2), 2)
"""
        for label in (3, -1)
    }

    def steps(self) -> dict[str, Step]:
        def inputs(seed: int) -> tuple[Tensor, ...]:
            generator = torch.Generator().manual_seed(seed)
            return maps(2, 4, 90, 100, seed=seed).to(DEVICE), torch.rand(2, 3000, 2, generator=generator).to(DEVICE)

        return {"700 of 3000": Step(inputs, lambda logits, points: (op(logits, None, points, 700),))}

    def refused(self) -> dict[str, Callable[[], Any]]:
        x, points = maps(2, 3, 5, 7).to(DEVICE), torch.rand(2, 9, 2, device=DEVICE)
        return {
            "logits: expected shape": lambda: op(x[0], None, points, 4),
            "points: expected float32": lambda: op(x, None, points.double(), 4),
            "count: expected from 0": lambda: op(x, None, points, 10),
            "logits: expected float32": lambda: op(x.int(), None, points, 4),
        }

    def refused_devices(self) -> dict[str, Callable[[], Any]]:
        x, points = maps(2, 3, 5, 7).to(DEVICE), torch.rand(2, 9, 2)
        return {"points: expected the device": lambda: op(x, None, points, 4)}
