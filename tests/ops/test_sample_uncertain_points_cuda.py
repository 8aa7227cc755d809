"""The CUDA kernels of sample_uncertain_points against the sum over all pixels, on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import paper_layers
from paper_layers import sample_uncertain_points
from testing.cases import Case, by_dtype
from tests.ops.test_sample_uncertain_points import between_centres, cases, formula
from tests.ops.test_uncertain_points import maps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is available")

DEVICE = "cuda"
op = torch.ops.paper_layers.sample_uncertain_points.default


def _check(case: Case) -> None:
    """The same points in the same order."""
    (logits,), options = case.tensors, case.options
    labels = options.get("labels")
    index = op(
        logits.to(DEVICE), None if labels is None else labels.to(DEVICE), options["points"].to(DEVICE), options["count"]
    )
    assert torch.equal(index.cpu(), formula(logits, **options))


def test_kernels_are_loaded() -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key("paper_layers::sample_uncertain_points", "CUDA")
    assert registered, paper_layers.show_config()


@by_dtype
def test_matches_formula(dtype: torch.dtype) -> None:
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(case=cases())
    def check(case: Case) -> None:
        _check(case.to(dtype))

    check()


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


@by_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(op, (maps(2, 3, 5, 7).to(DEVICE, dtype), None, torch.rand(2, 9, 2, device=DEVICE), 4))


def test_bad_arguments_are_refused_before_memory_is_touched() -> None:
    x, points = maps(2, 3, 5, 7).to(DEVICE), torch.rand(2, 9, 2, device=DEVICE)
    for message, call in {
        "logits: expected shape": lambda: op(x[0], None, points, 4),
        "points: expected float32": lambda: op(x, None, points.double(), 4),
        "points: expected the device": lambda: op(x, None, points.cpu(), 4),
        "count: expected from 0": lambda: op(x, None, points, 10),
        "logits: expected float32": lambda: op(x.int(), None, points, 4),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


def test_graph_capture() -> None:
    x = maps(2, 4, 90, 100).to(DEVICE)
    points = torch.rand(2, 3000, 2, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(x, None, points, 700)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(x, None, points, 700)
    x.copy_(maps(2, 4, 90, 100, seed=3))
    graph.replay()
    assert torch.equal(captured, op(x, None, points, 700))
