"""The fuzzer itself: some draws of each op, and faults that it must find."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tests.fuzz.__main__ import draw_once
from tests.fuzz.check import problems
from tests.fuzz.ops import OPS, Call, Draw


@pytest.mark.parametrize("op", OPS)
def test_draws(op: str) -> None:
    assert [found for seed in range(3) for found in draw_once(op, seed)] == []


def scaled(x: Tensor) -> Tensor:
    return 3 * x


def in_bfloat16(x: Tensor) -> Tensor:
    return (3 * x.bfloat16()).to(x.dtype)


def of_threads(x: Tensor) -> Tensor:
    return 3 * x + (torch.get_num_threads() == 3) * 1e-7


def of_batch(x: Tensor) -> Tensor:
    return 3 * x + (len(x) == 4) * 1e-7


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (in_bfloat16, "output 0: .* wrong"),
        (of_threads, "3 threads give other bits than 1: output 0"),
        (of_batch, "row 0 alone gives other bits than in a batch of 4: output 0"),
    ],
)
def test_faults_are_found(function: object, message: str) -> None:
    x = torch.linspace(0.01, 1, 8).view(4, 2)

    def found(function: object) -> str:
        call = Call(function, scaled, {"x": x}, rows=("x",))  # type: ignore[arg-type]
        return "\n".join(problems(call, Draw(0), 0))

    assert found(scaled) == ""
    assert re.search(message, found(function))
