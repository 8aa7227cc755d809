"""The CUDA kernels of uncertain_points against NumPy, on the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

import paper_layers
from paper_layers import uncertain_points
from testing.cases import Case, by_dtype
from tests.ops.test_uncertain_points import CHANGES, cases, formula, maps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is available")

DEVICE = "cuda"
op = torch.ops.paper_layers.uncertain_points.default


def _check(case: Case) -> None:
    """The same pixels in the same order; the layout is that of the CPU."""
    (logits,), labels, num_points = case.tensors, case.options.get("labels"), case.options["num_points"]
    on_device = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=DEVICE).copy_(logits)
    index = op(on_device, None if labels is None else labels.to(DEVICE), num_points)
    assert index.device == on_device.device
    assert torch.equal(index.cpu(), formula(logits, num_points, labels))


def test_kernels_are_loaded() -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key("paper_layers::uncertain_points", "CUDA")
    assert registered, paper_layers.show_config()


@by_dtype
def test_matches_formula(dtype: torch.dtype) -> None:
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(case=cases())
    def check(case: Case) -> None:
        if all(stride > 0 for stride in case.tensors[0].stride()):
            _check(case.to(dtype))

    check()


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


@by_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(op, (maps(2, 3, 5, 7).to(DEVICE, dtype), None, 4))


def test_bad_arguments_are_refused_before_memory_is_touched() -> None:
    x, labels = maps(2, 3, 5, 7).to(DEVICE), torch.tensor([0, 1], device=DEVICE)
    for message, call in {
        "logits: expected shape": lambda: op(x[0], None, 4),
        "num_points: expected at least 0": lambda: op(x, None, -1),
        "labels: expected int64": lambda: op(x, labels.int(), 4),
        "labels: expected the device": lambda: op(x, labels.cpu(), 4),
        "logits: expected float32": lambda: op(x.int(), None, 4),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("label", [3, -1])
def test_label_out_of_range_is_an_assertion(label: int) -> None:
    """In a process of its own, since the device is of no more use to one that failed an assertion."""
    code = f"""
import torch, paper_layers
x, labels = torch.zeros(1, 3, 4, 4, device="cuda"), torch.tensor([{label}], device="cuda")
torch.ops.paper_layers.uncertain_points(x, labels, 2)
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode != 0
    assert "device-side assert" in result.stderr


def test_graph_capture() -> None:
    x = maps(2, 4, 90, 100).to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        uncertain_points(x, 500)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = uncertain_points(x, 500)
    x.copy_(maps(2, 4, 90, 100, seed=3))
    graph.replay()
    for got, want in zip(captured, uncertain_points(x, 500), strict=True):
        assert torch.equal(got, want)


def test_more_elements_than_32_bits_count() -> None:
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free device memory")
    logits = torch.zeros(1, 9, 2**14, 2**14, device=DEVICE, dtype=torch.bfloat16)
    logits[0, 8, -1, -1] = torch.nan
    logits[0, 8, 0, :3] = 1
    index = op(logits, torch.tensor([8], device=DEVICE), 3)
    assert index.tolist() == [[2**28 - 1, 3, 4]]
