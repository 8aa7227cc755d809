"""The CUDA kernels of SoftTriple: each against its CPU kernel, and the whole against the formula, in float64 there."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paper_layers
from paper_layers import soft_triple_loss
from paper_layers.ops.soft_triple.logits import soft_triple_logits
from tests.ops.test_neighbor_reduce_cuda import DEVICE, LAYOUTS
from tests.ops.test_soft_triple import TestSoftTriple as OnCPU
from tests.ops.test_soft_triple import formula, relaxed, vectors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is available")

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
CASE = OnCPU.fixed_cases()[0]


def _close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        got.cpu().double(),
        want,
        rtol=tolerance,
        atol=tolerance * scale,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


def _check(embeddings: Tensor, centers: Tensor, labels: Tensor, **options: Any) -> None:
    """The loss and its gradients, of tensors on the device in any layout."""
    leaves = [t.detach().requires_grad_() for t in (embeddings, centers)]
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    actual = soft_triple_loss(*leaves, labels, **options)
    expected = formula(*exact, labels.cpu(), **options)
    dtype = embeddings.dtype
    assert (actual.dtype, actual.device.type) == (torch.promote_types(dtype, torch.float32), DEVICE)
    _close("loss", actual, expected, dtype)
    grad = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    grads = torch.autograd.grad(actual, leaves, grad.to(actual))
    for name, got, want in zip(
        ("grad_embeddings", "grad_centers"), grads, torch.autograd.grad(expected, exact, grad), strict=True
    ):
        assert got.dtype == dtype
        _close(name, got, want, dtype, 40)


def _on_device(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(t.to(DEVICE, dtype) if t.is_floating_point() else t.to(DEVICE) for t in tensors)


def _problem(
    rows: int, classes: int, count: int, channels: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows))
    return _on_device(vectors(rows, channels), vectors(classes, count, channels), labels, dtype=dtype)


@st.composite
def _problems(draw: Any) -> tuple[Any, ...]:
    (embeddings, centers), options = (case := draw(OnCPU.cases())).tensors, dict(case.options)
    labels = options.pop("labels").to(DEVICE)
    layouts = [LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))] for _ in range(2)]
    return embeddings, centers, labels, layouts, options


@pytest.mark.parametrize("name", [*OnCPU.ops, "soft_triple_labels"])
def test_kernels_are_loaded(name: str) -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"paper_layers::{name}", DEVICE.upper())
    assert registered, paper_layers.show_config()


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_formula(dtype: torch.dtype) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(problem=_problems())
    def check(problem: tuple[Any, ...]) -> None:
        embeddings, centers, labels, layouts, options = problem
        x, w = (layout(t) for layout, t in zip(layouts, _on_device(embeddings, centers, dtype=dtype), strict=True))
        _check(x, w, labels, **options)

    check()


@pytest.mark.parametrize("name", OnCPU.ops)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_kernel_equals_that_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    given = OnCPU.op_arguments(CASE.to(torch.float64))[name]
    exact = [a.clone() if isinstance(a, Tensor) else a for a in given]
    mine = [_on_device(a.clone(), dtype=dtype)[0] if isinstance(a, Tensor) else a for a in given]
    results = [OnCPU.ops[name](*arguments) for arguments in (mine, exact)]
    got, want = ([] if r is None else list(r) if isinstance(r, tuple) else [r] for r in results)
    # What is written in place counts, too.
    for a, b in zip([*got, mine[0]], [*want, exact[0]], strict=True):
        _close(name, a, b, dtype, 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes", "count"), [(1, 1030, 3), (300, 1030, 1), (301, 259, 7), (77, 130, 33)])
@pytest.mark.parametrize("chunk_size", [None, 100])
def test_many_blocks(dtype: torch.dtype, rows: int, classes: int, count: int, chunk_size: int | None) -> None:
    """Neither the batch nor the classes a multiple of anything, in one chunk and in several."""
    _check(*_problem(rows, classes, count, 70, dtype), tau=2.0, reduction="none", chunk_size=chunk_size)


def test_extremes() -> None:
    embeddings, centers, labels = _problem(40, 50, 5, 12)
    for value in (torch.nan, torch.inf, -torch.inf):
        spoiled = embeddings.clone()
        spoiled[3, 2] = value
        losses = soft_triple_loss(spoiled, centers, labels, reduction="none")
        assert losses.isfinite().tolist() == [row != 3 for row in range(40)]
    for length in (1e-13, 0.0):  # Both count as zero.
        short, close = embeddings.clone(), centers.clone()
        short[5] *= length
        close[2, 3] *= length
        leaves = [t.requires_grad_() for t in (short, close)]
        grads = torch.autograd.grad(soft_triple_loss(*leaves, labels), leaves)
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[0][5].any()
        assert not grads[1][2, 3].any()
    merged = centers[:, :1].expand_as(centers).contiguous().requires_grad_()
    for dtype in DTYPES:
        loss = soft_triple_loss(embeddings.to(dtype), merged.to(dtype), labels, tau=5.0)
        assert torch.autograd.grad(loss, merged)[0].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_empty(rows: int, reduction: str) -> None:
    embeddings, centers, labels = _problem(rows, 9, 2, 6)
    leaves = [t.requires_grad_() for t in (embeddings, centers)]
    loss = soft_triple_loss(*leaves, torch.full_like(labels, -100), reduction=reduction)
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert not loss.any()
    assert not any(grad.any() for grad in torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7])
def test_logits(dtype: torch.dtype, count: int) -> None:
    x, w, _ = _problem(77, 210, count, 30, dtype)
    leaves = [t.requires_grad_() for t in (x, w)]
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    actual, expected = soft_triple_logits(*leaves, chunk_size=64), 20 * relaxed(*exact, 0.1)
    _close("logits", actual, expected, dtype, 10)
    grad = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    grads = torch.autograd.grad(actual, leaves, grad.to(actual))
    for got, want in zip(grads, torch.autograd.grad(expected, exact, grad), strict=True):
        _close("gradient", got, want, dtype, 1000)


def test_same_every_time() -> None:
    embeddings, centers, labels = _problem(250, 3000, 7, 32)
    leaves = [t.requires_grad_() for t in (embeddings, centers)]
    runs = []
    for _ in range(3):
        loss = soft_triple_loss(*leaves, labels)
        runs.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_gradients() -> None:
    leaves = [t.requires_grad_() for t in _on_device(*CASE.tensors, dtype=torch.float64)]
    options = {**CASE.options, "labels": CASE.options["labels"].to(DEVICE)}
    assert torch.autograd.gradcheck(lambda *t: soft_triple_loss(*t, **options), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: soft_triple_loss(*t, **options), leaves, fast_mode=True)


@pytest.mark.parametrize("name", OnCPU.ops)
def test_opcheck(name: str) -> None:
    arguments = [_on_device(a)[0] if isinstance(a, Tensor) else a for a in OnCPU.op_arguments(CASE)[name]]
    torch.library.opcheck(OnCPU.ops[name], tuple(arguments), test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_graph_breaks() -> None:
    embeddings, centers, labels = _problem(20, 30, 3, 8)
    runs = []
    for function in (soft_triple_loss, torch.compile(soft_triple_loss, backend="aot_eager", fullgraph=True)):
        leaves = [t.detach().requires_grad_() for t in (embeddings, centers)]
        loss = function(*leaves, labels)
        runs.append((loss, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(runs[1], runs[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_under_autocast(dtype: torch.dtype) -> None:
    embeddings, centers, labels = _problem(60, 200, 4, 64)
    with torch.autocast(DEVICE, dtype):
        _check(embeddings, centers, labels)


def test_kernels_check_what_they_are_handed() -> None:
    bad = _on_device(torch.zeros(3, 2, 4), dtype=torch.bfloat16)[0]
    with pytest.raises(RuntimeError, match="not implemented for 'BFloat16'"):
        OnCPU.ops["soft_triple_centers"](bad, True)
    for name, position in (("soft_triple_chunk", 1), ("soft_triple_chunk", 2), ("soft_triple_similarity", 1)):
        arguments = [_on_device(a)[0] if isinstance(a, Tensor) else a for a in OnCPU.op_arguments(CASE)[name]]
        arguments[position] = arguments[position].cpu()
        with pytest.raises(RuntimeError, match="expected the device"):
            OnCPU.ops[name](*arguments)
    embeddings, centers, labels = _problem(4, 5, 2, 8)
    with pytest.raises(ValueError, match="labels: expected the device"):
        soft_triple_loss(embeddings, centers, labels.cpu())
    with pytest.raises(ValueError, match="centers: expected the device"):
        soft_triple_loss(embeddings, centers.cpu(), labels)


@pytest.mark.parametrize("label", [5, -1])
def test_labels_out_of_range_are_an_assertion(label: int) -> None:
    """In a process of its own, since the device is of no more use to one that failed an assertion."""
    code = f"""
import torch, paper_layers
x, w = torch.ones(3, 4, device="cuda"), torch.ones(5, 2, 4, device="cuda")
paper_layers.soft_triple_loss(x, w, torch.full((3,), {label}, device="cuda"))
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode != 0
    assert "device-side assert" in result.stderr


def test_runs_on_the_current_stream() -> None:
    embeddings, centers, labels = _problem(128, 2000, 4, 64)
    wanted = soft_triple_loss(embeddings, centers, labels)
    late = torch.zeros_like(embeddings)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # the loss must wait for what comes before it on its own stream
        late.copy_(embeddings)
        loss = soft_triple_loss(late, centers, labels)
    stream.synchronize()
    assert torch.equal(loss, wanted)


def test_graph_capture() -> None:
    """Forward and backward wait for nothing on the host."""
    embeddings, centers, labels = _problem(64, 300, 3, 16)
    leaves = [t.requires_grad_() for t in (embeddings, centers)]

    def step() -> tuple[Tensor, ...]:
        loss = soft_triple_loss(*leaves, labels)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        embeddings.copy_(embeddings.flip(0))
        labels.copy_((labels + 1) % 300)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_input() -> None:
    problem = [t.to("cuda:1") for t in _problem(20, 30, 3, 8)]
    with torch.cuda.device(0):
        _check(*problem)


def test_more_scores_than_32_bits_count() -> None:
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free device memory")
    rows, classes, count = 64, 2**24 + 3, 2
    assert rows * classes * count > 2**31
    generator = torch.Generator(DEVICE).manual_seed(0)
    embeddings = torch.randn(rows, 4, device=DEVICE, generator=generator).requires_grad_()
    centers = torch.randn(classes, count, 4, device=DEVICE, generator=generator).requires_grad_()
    labels = torch.arange(classes - rows, classes, device=DEVICE)
    # A few million scores at a time go the way of 32 bits.
    losses = [soft_triple_loss(embeddings, centers, labels, chunk_size=size) for size in (classes, 2**15)]
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, (embeddings, centers)) for loss in losses]
    torch.testing.assert_close(*grads)
    last = [grad[1][-rows:] for grad in grads]
    assert last[1].any()
    torch.testing.assert_close(*last, atol=0, rtol=1e-3)
