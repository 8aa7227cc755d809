from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from paper_layers import edge_conv
from testing.battery import OpBattery
from testing.cases import Case, assert_close, by_dtype
from tests.ops.test_neighbor_reduce import features, table


def activated(center: Tensor, neighbor: Tensor, index: Tensor, slope: Tensor) -> Tensor:
    """All edges side by side."""
    z = (center[:, None] + neighbor[index.clamp(min=0)]).where(index[..., None] >= 0, 0)
    return torch.where(z > 0, z, slope * z)


def parts(
    center: Tensor, neighbor: Tensor, slope: Tensor, index: Tensor, minimum_where: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept edges, the mean and the variance, by the formula."""
    if center.dim() == 3:
        start = torch.arange(len(index))[:, None, None] * neighbor.shape[1]
        flat = torch.where(index < 0, -1, index + start).flatten(0, 1)
        output, mean, var = parts(center.flatten(0, 1), neighbor.flatten(0, 1), slope, flat, minimum_where)
        return output.view(center.shape), mean, var
    if index.numel() == 0 or len(neighbor) == 0:
        zero = 0 * (slope + center.nan_to_num(0, 0, 0).sum() + neighbor.nan_to_num(0, 0, 0).sum())
        return torch.zeros_like(center) + zero, *(zero.expand(center.shape[1]) for _ in range(2))
    y = activated(center, neighbor, index, slope)
    there = index[..., None] >= 0
    sign = torch.ones(center.shape[1], dtype=y.dtype)
    if minimum_where is not None:
        sign = torch.where(minimum_where, -sign, sign)
    key = (sign * y).where(there, -torch.inf).detach()
    best = key.amax(1, keepdim=True)
    found = there & ((key == best) | (key.isnan() & best.isnan()))
    output = y.where(found & (found.cumsum(1) == 1), 0).sum(1)
    count = there.sum().clamp(min=1)
    mean = y.where(there, 0).sum((0, 1)) / count
    return output, mean, (y - mean).where(there, 0).square().sum((0, 1)) / count


def joined(results: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([result.to(results[1].dtype).flatten() for result in results])


def formula(center: Tensor, neighbor: Tensor, slope: Tensor, **options: Any) -> Tensor:
    return joined(parts(center, neighbor, slope, **options))


def function(center: Tensor, neighbor: Tensor, slope: Tensor, **options: Any) -> Tensor:
    return joined(edge_conv(center, neighbor, negative_slope=slope.to(center.device), **options))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, nodes = draw(st.integers(0, 60)), draw(st.integers(0, 60))
    k, channels = draw(st.integers(0, 20)), draw(st.sampled_from([0, 1, 3, 8, 17, 40, 100]))
    seed = draw(st.integers(0, 2**20))
    # Exact in every dtype, so that all agree which edges are the largest and which are above zero.
    center = (4 * features(nodes, channels, seed=seed)).round() / 4
    neighbor = (4 * features(rows, channels, seed=seed + 1)).round() / 4
    index = table(nodes, k, rows=rows, seed=seed)
    change = [
        lambda x: x,
        lambda x: torch.where(x > 2, torch.nan, x),
        lambda x: torch.where(x > 2, torch.inf, x),
    ]
    neighbor = draw(st.sampled_from(change))(neighbor)
    layout = draw(st.sampled_from(["contiguous", "transposed", "expanded", "batch"]))
    if layout == "transposed":
        center, neighbor, index = (t.mT.contiguous().mT for t in (center, neighbor, index))
    elif layout == "expanded":
        center, neighbor = center[:, :1].expand(center.shape), neighbor[:1].expand(neighbor.shape)
    elif layout == "batch":
        center, neighbor = torch.stack([center, center.flip(0)]), torch.stack([neighbor, neighbor.flip(0)])
        index = torch.stack([index, table(nodes, k, rows=rows, seed=seed + 1)])
    slope = torch.tensor(draw(st.sampled_from([0.0, 0.25, 1.0, 2.0, -0.5])))
    minimum_where = draw(st.sampled_from([None, torch.arange(channels) % 3 == 0]))
    return Case((center, neighbor, slope), {"index": index, "minimum_where": minimum_where})


def call(**change: Any) -> Any:
    arguments = {"center": features(8, 3), "neighbor": features(10, 3), "index": table(8, 4, rows=10), **change}
    return lambda: edge_conv(**arguments)


class TestEdgeConv(OpBattery):
    function = staticmethod(function)
    formula = staticmethod(formula)
    cases = staticmethod(cases)
    grad_scale = 40.0  # the slope's is a sum over all edges
    ops = {  # noqa: RUF012
        "edge_conv": torch.ops.paper_layers.edge_conv.default,
        "edge_conv_backward": torch.ops.paper_layers.edge_conv_backward.default,
    }
    taken = frozenset(
        [
            ("edge_conv", "a dimension more of tensor 2"),  # a table of one cloud, beside the rows of all clouds
            ("edge_conv", "a dimension more of tensor 3"),  # slopes
            ("edge_conv_backward", "a dimension more of tensor 6"),
        ]
    )
    bad_inputs = {  # noqa: RUF012
        "rank": (call(center=features(3)), ValueError, r"center: expected shape .*got \(3,\)"),
        "integers": (call(neighbor=torch.ones(10, 3, dtype=torch.int64)), TypeError, "neighbor: .*torch.int64"),
        "channels": (call(neighbor=features(10, 4)), ValueError, r"neighbor: expected shape \(N, 3\), got \(10, 4\)"),
        "index type": (call(index=[[1]]), TypeError, "index: expected an int64 Tensor, got list"),
        "index rows": (call(index=table(7, 4, rows=10)), ValueError, r"index: expected shape \(8, k\), got \(7, 4\)"),
        "device": (call(index=table(8, 4, rows=10).to("meta")), ValueError, "index: .*cpu, got meta"),
        "slopes": (call(negative_slope=torch.ones(3)), ValueError, r"negative_slope: .*one element, got shape \(3,\)"),
        "minimum_where type": (call(minimum_where=torch.ones(3)), TypeError, "minimum_where: expected a bool Tensor"),
        "minimum_where shape": (
            call(minimum_where=torch.ones(4, dtype=torch.bool)),
            ValueError,
            r"minimum_where: expected shape \(3,\), got \(4,\)",
        ),
        "out of bounds": (
            call(index=torch.full((8, 4), 10)),
            RuntimeError,
            "index: expected -1 or a row below 10, got 10",
        ),
    }

    @staticmethod
    def output_dtype(dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    @staticmethod
    def fixed_cases() -> list[Case]:
        slope, minimum_where = torch.tensor(0.3), torch.tensor([True, False, True, False, False])
        return [
            Case((features(7, 5), features(9, 5, seed=1), slope), {"index": table(7, 4, rows=9)}),
            Case(
                (features(2, 6, 5), features(2, 8, 5, seed=1), slope),
                {"index": table(2, 6, 3, rows=8), "minimum_where": minimum_where},
            ),
        ]

    def outputs(self, center: Tensor, neighbor: Tensor, slope: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return edge_conv(center, neighbor, negative_slope=slope, **options)

    def alias_cases(self) -> list[Case]:
        return [Case((features(7, 5), features(7, 5, seed=1), torch.tensor(0.3)), {"index": table(7, 4, rows=7)})]

    @staticmethod
    def op_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
        (center, neighbor, slope), index = case.tensors, case.options["index"]
        arguments = (center, neighbor, index, slope, case.options.get("minimum_where"), 0.0, True)
        output, mean, var = torch.ops.paper_layers.edge_conv(*arguments)
        grads = (torch.ones_like(output), torch.ones_like(mean), torch.ones_like(var))
        return {
            "edge_conv": arguments,
            "edge_conv_backward": (*grads, center, neighbor, index, slope, output, mean, 0.0),
        }


@by_dtype
@pytest.mark.parametrize("channels", [5, 64, 200])
def test_without_statistics(channels: int, dtype: torch.dtype) -> None:
    center, neighbor = features(300, channels).to(dtype), features(300, channels, seed=1).to(dtype)
    index = table(300, 9, rows=300)
    kept, mean, var = edge_conv(center.requires_grad_(), neighbor, index, negative_slope=0.25, return_statistics=False)
    assert (mean.numel(), var.numel()) == (0, 0)
    assert torch.equal(kept, edge_conv(center, neighbor, index, negative_slope=0.25)[0])
    (grad,) = torch.autograd.grad(kept.sum(), center)
    exact = center.detach().double().requires_grad_()
    expected = parts(exact, neighbor.double(), torch.tensor(0.25), index)[0]
    assert_close(grad, torch.autograd.grad(expected.sum(), exact)[0], dtype)


@pytest.mark.parametrize("channels", [1, 64])
def test_relu_of_infinities_and_nan(channels: int) -> None:
    center = torch.zeros(3, channels)
    neighbor = torch.tensor([-torch.inf, 1.0, torch.nan]).unsqueeze(1).expand(3, channels)
    output, mean, _ = edge_conv(center, neighbor, torch.tensor([[0], [1], [0]]))
    assert output[:, 0].tolist() == [0, 1, 0]
    torch.testing.assert_close(mean, torch.full((channels,), 1 / 3))
    assert edge_conv(center, neighbor, torch.tensor([[0, 2], [2, 1], [2, -1]]))[0].isnan().all()


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_statistics_far_from_zero(offset: float) -> None:
    """Float32 sums of squares would lose the variance altogether."""
    center, neighbor = features(2000, 20) + offset, features(2000, 20, seed=1)
    center[0] = 1e6  # one node does not decide
    index = table(2000, 12, rows=2000)
    index[0] = -1
    _, mean, var = edge_conv(center, neighbor, index, negative_slope=1.0)
    _, expected_mean, expected_var = parts(center.double(), neighbor.double(), torch.tensor(1.0), index)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), expected_var, rtol=2e-3 if offset else 1e-6, atol=0)


@pytest.mark.cpu_only
def test_same_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    center, neighbor = features(3000, 70).requires_grad_(), features(3000, 70, seed=1).requires_grad_()
    index = table(3000, 20, rows=40)  # many edges into few nodes
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            output = joined(edge_conv(center, neighbor, index))
            results.append((output, *torch.autograd.grad(output.square().sum(), (center, neighbor))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_nothing_of_an_edge_is_saved() -> None:
    center, neighbor = features(500, 32).requires_grad_(), features(500, 32, seed=1).requires_grad_()
    index = table(500, 100, rows=500)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        edge_conv(center, neighbor, index)
    assert max(sizes) <= max(center.numel(), index.numel())
