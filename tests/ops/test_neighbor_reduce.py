from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from paper_layers import knn, neighbor_reduce
from testing.battery import OpBattery
from testing.cases import Case, by_dtype

REDUCTIONS = ("max", "min", "sum", "mean")


def formula(input: Tensor, index: Tensor, reduction: str = "max", relative: bool = False) -> Tensor:
    """All neighbours' rows side by side, then the reduction."""
    if input.dim() == 3:
        return torch.stack([formula(x, i, reduction, relative) for x, i in zip(input, index, strict=True)])
    there = index[..., None] >= 0
    if len(input) == 0 or index.shape[1] == 0:
        return input.new_zeros(len(index), input.shape[1]) + 0 * input.nan_to_num(0, 0, 0).sum()
    rows = input[index.clamp(min=0)]
    values = rows - input[:, None] if relative else rows
    if reduction in ("sum", "mean"):
        total = values.where(there, 0).sum(1)
        return total / there.sum(1).clamp(min=1) if reduction == "mean" else total
    key = rows.where(there, -torch.inf if reduction == "max" else torch.inf).detach()
    best = key.amax(1, keepdim=True) if reduction == "max" else key.amin(1, keepdim=True)
    found = there & ((key == best) | (key.isnan() & best.isnan()))
    first = found & (found.cumsum(1) == 1)
    return values.where(first, 0).sum(1)


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def table(*shape: int, rows: int, seed: int = 0) -> Tensor:
    """Neighbours, some repeated and some missing."""
    return torch.randint(-1, rows, shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    relative = draw(st.booleans())
    rows = draw(st.integers(0, 60))
    nodes = rows if relative else draw(st.integers(0, 60))
    k, channels = draw(st.integers(0, 20)), draw(st.sampled_from([0, 1, 3, 8, 17, 40, 100]))
    seed = draw(st.integers(0, 2**20))
    input, index = features(rows, channels, seed=seed), table(nodes, k, rows=rows, seed=seed)
    change = [
        lambda x: x,
        lambda x: (2 * x).round(),
        lambda x: torch.where(x > 2, torch.nan, x),
        lambda x: torch.where(x > 1, torch.inf, -torch.inf),
    ]
    # The difference of infinities is NaN, which is not in their order.
    input = draw(st.sampled_from(change[:3] if relative else change))(input)
    layout = draw(st.sampled_from(["contiguous", "transposed", "expanded", "batch"]))
    if layout == "transposed":
        input, index = input.mT.contiguous().mT, index.mT.contiguous().mT
    elif layout == "expanded":
        input = input[:, :1].expand(rows, channels)
    elif layout == "batch":
        input = torch.stack([input, input.flip(0)])
        index = torch.stack([index, table(nodes, k, rows=rows, seed=seed + 1)])
    return Case((input,), {"index": index, "reduction": draw(st.sampled_from(REDUCTIONS)), "relative": relative})


def call(**change: Any) -> Any:
    arguments = {"input": features(10, 3), "index": table(8, 4, rows=10), **change}
    return lambda: neighbor_reduce(**arguments)


class TestNeighborReduce(OpBattery):
    function = staticmethod(neighbor_reduce)
    formula = staticmethod(formula)
    cases = staticmethod(cases)
    ops = {  # noqa: RUF012
        "neighbor_reduce": torch.ops.paper_layers.neighbor_reduce.default,
        "neighbor_reduce_backward": torch.ops.paper_layers.neighbor_reduce_backward.default,
    }
    # Sums and means have no use for the third tensor.
    taken = frozenset([("neighbor_reduce_backward", "a dimension more of tensor 2")])
    bad_inputs = {  # noqa: RUF012
        "rank": (call(input=features(4)), ValueError, r"input: expected shape .*got \(4,\)"),
        "integers": (call(input=torch.ones(10, 3, dtype=torch.int64)), TypeError, "input: .*torch.int64"),
        "index type": (call(index=[[1]]), TypeError, "index: expected an int64 Tensor, got list"),
        "index dtype": (call(index=torch.ones(8, 4)), TypeError, "index: expected an int64 Tensor, got torch.float32"),
        "index rank": (
            call(index=torch.ones(8, dtype=torch.int64)),
            ValueError,
            r"index: expected shape \(M, k\), got \(8,\)",
        ),
        "clouds": (
            call(input=features(2, 10, 3), index=table(3, 8, 4, rows=10)),
            ValueError,
            r"index: expected shape \(2, M, k\), got \(3, 8, 4\)",
        ),
        "device": (call(index=table(8, 4, rows=10).to("meta")), ValueError, "index: .*cpu, got meta"),
        "reduction": (
            call(reduction="median"),
            ValueError,
            "reduction: expected one of max, min, sum, mean, got 'median'",
        ),
        "centres": (call(relative=True), ValueError, "index: expected 10 rows with relative, got 8"),
        "out of bounds": (
            call(index=torch.full((8, 4), 10)),
            RuntimeError,
            "index: expected -1 or a row below 10, got 10",
        ),
    }

    @staticmethod
    def fixed_cases() -> list[Case]:
        return [
            Case((features(9, 5),), {"index": table(7, 4, rows=9), "reduction": "max"}),
            Case((features(2, 6, 3),), {"index": table(2, 8, 3, rows=6), "reduction": "min"}),
            Case((features(9, 4),), {"index": table(7, 4, rows=9), "reduction": "sum"}),
            Case((features(9, 4),), {"index": table(7, 4, rows=9), "reduction": "mean"}),
            Case((features(8, 5),), {"index": table(8, 4, rows=8), "reduction": "max", "relative": True}),
            Case((features(2, 6, 3),), {"index": table(2, 6, 2, rows=6), "reduction": "sum", "relative": True}),
        ]

    @staticmethod
    def op_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
        input, index, reduction = case.tensors[0], case.options["index"], case.options["reduction"]
        relative = case.options.get("relative", False)
        if input.dim() == 3:
            input, index = input[0], index[0]
        output, arg = torch.ops.paper_layers.neighbor_reduce(input, index, reduction, relative)
        return {
            "neighbor_reduce": (input, index, reduction, relative),
            "neighbor_reduce_backward": (torch.ones_like(output), index, arg, len(input), reduction, relative),
        }


@by_dtype
@pytest.mark.parametrize("channels", [3, 16, 50])
def test_differences_to_the_centre(channels: int, dtype: torch.dtype) -> None:
    """The maximum of the differences is the difference of the maximum, bit by bit."""
    x = features(200, channels).to(dtype)
    index, _ = knn(x, k=9)
    expected = (x[index] - x[:, None]).amax(1)
    assert torch.equal(neighbor_reduce(x, index, relative=True), expected)


@pytest.mark.cpu_only
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_same_for_any_number_of_threads(reduction: str, relative: bool) -> None:
    threads = torch.get_num_threads()
    x, index = features(3000, 70).requires_grad_(), table(3000, 20, rows=40)  # many edges into few nodes
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            output = neighbor_reduce(x, index, reduction, relative=relative)
            results.append((output, *torch.autograd.grad(output.square().sum(), x)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_backward_ignores_columns_that_do_not_exist() -> None:
    arg = torch.tensor([[0, 7, -5], [1, 1, 2]], dtype=torch.int32)
    index = torch.tensor([[1, 0], [2, -1]])
    result = torch.ops.paper_layers.neighbor_reduce_backward(torch.ones(2, 3), index, arg, 3, "max", False)
    assert result.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
