from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from paper_layers.ops.edge_conv_norm import edge_conv_norm
from testing.battery import OpBattery
from testing.cases import Case
from tests.ops import test_edge_conv as edges
from tests.ops.test_neighbor_reduce import features, table


def formula(
    center: Tensor,
    neighbor: Tensor,
    slope: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    index: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 1e-5,
    opposite: bool = False,
) -> Tensor:
    smallest = (torch.zeros(center.shape[-1]) if weight is None else weight) < 0
    if index.dim() > center.dim():
        center, neighbor = (t.unflatten(0, (len(index), len(t) // len(index))) for t in (center, neighbor))
    extreme, own_mean, own_var = edges.parts(center, neighbor, slope, index, smallest ^ opposite)
    mean, var = (own_mean, own_var) if mean is None or var is None else (mean.to(center.dtype), var.to(center.dtype))
    output = (extreme - mean) / (var + eps).sqrt() * (1 if weight is None else weight) + (0 if bias is None else bias)
    return output.where((index >= 0).any(-1, keepdim=True), 0)


def function(center: Tensor, neighbor: Tensor, slope: Tensor, *parameters: Tensor, **options: Any) -> Tensor:
    names = dict(zip(("weight", "bias"), parameters, strict=False))
    return edge_conv_norm(center, neighbor, negative_slope=slope, **names, **options).output


@st.composite
def cases(draw: st.DrawFn) -> Case:
    terms = draw(edges.cases())
    center, neighbor, slope = terms.tensors
    neighbor = torch.where(neighbor.isfinite(), neighbor, 0)
    channels, index = center.shape[-1], terms.options["index"]
    if center.dim() == 3 and draw(st.booleans()):
        center, neighbor = center.flatten(0, 1), neighbor.flatten(0, 1)
    weight, bias = (
        features(channels, seed=1).sign() * (1 + features(channels, seed=2).abs()),
        features(channels, seed=3),
    )
    count = draw(st.integers(0, 2))
    options: dict[str, Any] = {
        "index": index,
        "eps": draw(st.sampled_from([0.5, 2.0])),
        "opposite": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options |= {"mean": features(channels, seed=4), "var": 1 + features(channels, seed=5).square()}
    return Case((center, neighbor, slope, *(weight, bias)[:count]), options)


class TestEdgeConvNorm(OpBattery):
    function = staticmethod(function)
    formula = staticmethod(formula)
    cases = staticmethod(cases)
    grad_scale = 40.0  # the slope's is a sum over all edges
    ops = {  # noqa: RUF012
        "edge_conv_norm": torch.ops.paper_layers.edge_conv_norm.default,
        "edge_conv_norm_backward": torch.ops.paper_layers.edge_conv_norm_backward.default,
    }
    taken = frozenset(
        [
            ("edge_conv_norm", "a dimension more of tensor 2"),  # a table of one cloud, beside the rows of all clouds
            ("edge_conv_norm", "a dimension more of tensor 3"),  # slopes
            ("edge_conv_norm_backward", "a dimension more of tensor 4"),
        ]
    )
    bad_inputs = {  # noqa: RUF012
        "slopes": (
            lambda: edge_conv_norm(features(4, 2), features(4, 2), table(4, 3, rows=4), negative_slope=torch.ones(3)),
            ValueError,
            r"negative_slope: .*one element, got shape \(3,\)",
        ),
        "out of bounds": (
            lambda: edge_conv_norm(features(8, 4), features(8, 4), torch.full((2, 4, 1), 4)),
            RuntimeError,
            "index: expected -1 or a row below 4, got 4",
        ),
        "clouds": (
            lambda: edge_conv_norm(features(8, 4), features(9, 4), table(2, 4, 3, rows=4)),
            RuntimeError,
            "neighbor: expected rows of 2 clouds of one size, got 9",
        ),
    }

    @staticmethod
    def fixed_cases() -> list[Case]:
        slope, parameters = torch.tensor(0.3), (torch.tensor([1.5, -0.7, 2.0, -1.0, 0.3]), features(5))
        terms = (features(7, 5), features(9, 5, seed=1), slope)
        given = {"mean": features(5, seed=2), "var": 1 + features(5, seed=3).square()}
        return [
            Case((*terms, *parameters), {"index": table(7, 4, rows=9), "eps": 0.1}),
            Case(
                (features(12, 5), features(16, 5, seed=1), slope), {"index": table(2, 6, 3, rows=8), "opposite": True}
            ),
            Case((features(2, 6, 5), features(2, 8, 5, seed=1), slope, *parameters), {"index": table(2, 6, 3, rows=8)}),
            Case((*terms, *parameters), {"index": table(7, 4, rows=9), **given}),
        ]

    def alias_cases(self) -> list[Case]:
        return [Case((features(7, 5), features(7, 5, seed=1), torch.tensor(0.3)), {"index": table(7, 4, rows=7)})]

    @staticmethod
    def op_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
        (center, neighbor, slope, *parameters), options = case.tensors, case.options
        weight, bias = parameters or (None, None)
        mean, var, eps = options.get("mean"), options.get("var"), options.get("eps", 1e-5)
        arguments = (center, neighbor, options["index"], slope, weight, bias, mean, var, 0.0, eps, False)
        output, extreme, own_mean, own_var, _ = torch.ops.paper_layers.edge_conv_norm(*arguments)
        used = (own_mean, own_var) if mean is None else (mean, var)
        backward = (torch.ones_like(output), *arguments[:5], extreme, *used, 0.0, eps, mean is None)
        return {"edge_conv_norm": arguments, "edge_conv_norm_backward": backward}


def test_statistics_and_count() -> None:
    center, neighbor, index = features(40, 6), features(40, 6, seed=1), table(40, 5, rows=40)
    found = edge_conv_norm(center, neighbor, index, negative_slope=0.2)
    _, mean, var = edges.parts(center, neighbor, torch.tensor(0.2), index)
    torch.testing.assert_close(tuple(found[1:]), (mean, var, (index >= 0).sum()))
    empty = edge_conv_norm(center, neighbor, torch.full_like(index, -1))
    assert not any(part.any() for part in empty)


@pytest.mark.cpu_only
def test_same_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    center, neighbor, weight = (features(n, 70).requires_grad_() for n in (3000, 3000, 1))
    index = table(3000, 20, rows=40)
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            output = edge_conv_norm(center, neighbor, index, weight=weight[0]).output
            results.append((output, *torch.autograd.grad(output.square().sum(), (center, neighbor, weight))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
