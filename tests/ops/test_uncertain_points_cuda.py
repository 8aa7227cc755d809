"""The CUDA kernels of uncertain_points against NumPy, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from paper_layers import uncertain_points
from testing.cases import DTYPES, Case, by_dtype
from testing.cuda_battery import DEVICE, CudaBattery, Step, needs_cuda, needs_memory
from tests.ops import test_uncertain_points as on_cpu
from tests.ops.test_uncertain_points import CHANGES, formula, maps

pytestmark = needs_cuda

op = torch.ops.paper_layers.uncertain_points.default


def _check(case: Case) -> None:
    """The same pixels in the same order; the layout is that of the CPU."""
    placed = case.on(DEVICE)
    index = op(*placed.tensors, placed.options.get("labels"), placed.options["num_points"])
    assert index.device.type == DEVICE
    assert torch.equal(index.cpu(), formula(*case.tensors, **case.options))


@by_dtype
@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("num_points", [1, 3000, 150_000])
def test_many_blocks(dtype: torch.dtype, change: str, num_points: int) -> None:
    logits = CHANGES[change](maps(1, 3, 300, 500)).to(dtype)
    _check(Case((logits,), {"num_points": num_points}))
    _check(Case((logits,), {"num_points": num_points, "labels": torch.tensor([2])}))


def test_expanded() -> None:
    logits = maps(2, 3, 1, 1).to(DEVICE).expand(2, 3, 40, 50)
    assert torch.equal(op(logits, None, 5).cpu(), torch.arange(5).expand(2, 5))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 1, 1, 1)])
def test_empty(shape: tuple[int, ...]) -> None:
    _check(Case((maps(*shape),), {"num_points": 4}))
    _check(Case((maps(*shape),), {"num_points": 0}))


def test_points() -> None:
    logits = maps(2, 5, 30, 50)
    for got, want in zip(uncertain_points(logits.to(DEVICE), 99), uncertain_points(logits, 99), strict=True):
        torch.testing.assert_close(got.cpu(), want)


@pytest.mark.needs_gpu
def test_more_elements_than_32_bits_count() -> None:
    needs_memory(10)
    logits = torch.zeros(1, 9, 2**14, 2**14, device=DEVICE, dtype=torch.bfloat16)
    logits[0, 8, -1, -1] = torch.nan
    logits[0, 8, 0, :3] = 1
    index = op(logits, torch.tensor([8], device=DEVICE), 3)
    assert index.tolist() == [[2**28 - 1, 3, 4]]


class TestUncertainPointsOnDevice(CudaBattery, on_cpu.TestUncertainPoints):
    op_dtypes = tuple(DTYPES)
    out_of_range = {  # noqa: RUF012
        f"label {label}": f"""
x, labels = torch.zeros(1, 3, 4, 4), torch.tensor([{label}])
torch.ops.paper_layers.uncertain_points(x, labels, 2)
"""
        for label in (3, -1)
    }

    def steps(self) -> dict[str, Step]:
        def points(num_points: int) -> Step:
            return Step(
                lambda seed: (maps(2, 4, 90, 100, seed=seed).to(DEVICE),), lambda x: uncertain_points(x, num_points)
            )

        return {"500 of 9000": points(500), "all": points(9000)}

    def refused(self) -> dict[str, Callable[[], Any]]:
        x, labels = maps(2, 3, 5, 7).to(DEVICE), torch.tensor([0, 1], device=DEVICE)
        return {
            "logits: expected shape": lambda: op(x[0], None, 4),
            "num_points: expected at least 0": lambda: op(x, None, -1),
            "labels: expected int64": lambda: op(x, labels.int(), 4),
            "logits: expected float32": lambda: op(x.int(), None, 4),
        }

    def refused_devices(self) -> dict[str, Callable[[], Any]]:
        x = maps(2, 3, 5, 7).to(DEVICE)
        return {"labels: expected the device": lambda: op(x, torch.tensor([0, 1]), 4)}
