"""The CUDA kernels of SoftTriple: each against its CPU kernel, and the whole against the formula, in float64 there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paper_layers
from paper_layers import soft_triple_loss
from paper_layers.ops.soft_triple.logits import soft_triple_logits
from testing import raw_ops
from testing.cases import DTYPES, on_device
from testing.cuda_battery import DEVICE, LAYOUTS, CudaBattery, Step, assert_near, dtypes, needs_cuda, needs_memory
from tests.ops import test_soft_triple as on_cpu
from tests.ops.test_soft_triple import formula, relaxed, vectors

pytestmark = needs_cuda

OnCPU = on_cpu.TestSoftTriple
CASE = OnCPU.fixed_cases()[0]


def _check(embeddings: Tensor, centers: Tensor, labels: Tensor, **options: Any) -> None:
    """The loss and its gradients, of tensors on the device in any layout."""
    leaves = [t.detach().requires_grad_() for t in (embeddings, centers)]
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    actual = soft_triple_loss(*leaves, labels, **options)
    expected = formula(*exact, labels.cpu(), **options)
    dtype = embeddings.dtype
    assert (actual.dtype, actual.device.type) == (torch.promote_types(dtype, torch.float32), DEVICE)
    assert_near(actual, expected, dtype, name="loss")
    grad = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    grads = torch.autograd.grad(actual, leaves, grad.to(actual))
    for name, got, want in zip(
        ("grad_embeddings", "grad_centers"), grads, torch.autograd.grad(expected, exact, grad), strict=True
    ):
        assert got.dtype == dtype
        assert_near(got, want, dtype, atol=40, name=name)


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


@dtypes
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
    # Arguments that are written in place count, too.
    for a, b in zip([*got, mine[0]], [*want, exact[0]], strict=True):
        assert_near(a, b, dtype, atol=100, name=name)


@dtypes
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


@dtypes
@pytest.mark.parametrize("count", [1, 7])
def test_logits(dtype: torch.dtype, count: int) -> None:
    x, w, _ = _problem(77, 210, count, 30, dtype)
    leaves = [t.requires_grad_() for t in (x, w)]
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    actual, expected = soft_triple_logits(*leaves, chunk_size=64), 20 * relaxed(*exact, 0.1)
    assert_near(actual, expected, dtype, atol=10, name="logits")
    grad = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    grads = torch.autograd.grad(actual, leaves, grad.to(actual))
    for got, want in zip(grads, torch.autograd.grad(expected, exact, grad), strict=True):
        assert_near(got, want, dtype, atol=1000, name="gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_under_autocast(dtype: torch.dtype) -> None:
    embeddings, centers, labels = _problem(60, 200, 4, 64)
    with torch.autocast(DEVICE, dtype):
        _check(embeddings, centers, labels)


@pytest.mark.needs_gpu
def test_more_scores_than_32_bits_count() -> None:
    needs_memory(30)
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


class TestSoftTripleOnDevice(CudaBattery, on_cpu.TestSoftTriple):
    out_of_range = {  # noqa: RUF012
        f"label {label}": f"""
x, w = torch.ones(3, 4), torch.ones(5, 2, 4)
paper_layers.soft_triple_loss(x, w, torch.full((3,), {label}))
"""
        for label in (5, -1)
    }

    def test_kernels_are_loaded(self) -> None:
        for name in (*self.ops, "soft_triple_labels", "soft_triple_reduce", "soft_triple_reduce_backward"):
            assert raw_ops.has_kernel(name, self.device), paper_layers.show_config()

    def steps(self) -> dict[str, Step]:
        def inputs(seed: int) -> tuple[Tensor, ...]:
            embeddings, centers, labels = _problem(250, 3000, 7, 32)
            x, w = (t.roll(seed, 0).requires_grad_() for t in (embeddings, centers))
            return x, w, (labels + seed) % 3000

        def function(embeddings: Tensor, centers: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            loss = soft_triple_loss(embeddings, centers, labels)
            return loss.detach(), *torch.autograd.grad(loss, (embeddings, centers))

        return {"loss": Step(inputs, function)}

    def refused(self) -> dict[str, Callable[[], Any]]:
        bad = vectors(3, 2, 4).to(DEVICE, torch.bfloat16)
        rows = (vectors(3).to(DEVICE), vectors(3).to(DEVICE), vectors(1).to(DEVICE)[0], None)
        labels = torch.arange(3, device=DEVICE)
        reduce, pull = torch.ops.paper_layers.soft_triple_reduce, torch.ops.paper_layers.soft_triple_reduce_backward
        return {
            "not implemented for 'BFloat16'": lambda: self.ops["soft_triple_centers"](bad, True),
            "reduction: expected": lambda: reduce(*rows, labels, 0.1, "median"),
            "labels: expected": lambda: reduce(*rows, labels[:2], 0.1, "mean"),
            "grad: expected": lambda: pull(rows[0], *rows, labels, 0.1, "mean"),
        }

    def refused_devices(self) -> dict[str, Callable[[], Any]]:
        embeddings, centers, labels = _problem(4, 5, 2, 8)
        return {
            "labels: expected the device": lambda: soft_triple_loss(embeddings, centers, labels.cpu()),
            "centers: expected the device": lambda: soft_triple_loss(embeddings, centers.cpu(), labels),
        }

    @pytest.mark.needs_gpu
    @pytest.mark.parametrize(
        ("name", "position"), [("soft_triple_chunk", 1), ("soft_triple_chunk", 2), ("soft_triple_similarity", 1)]
    )
    def test_kernels_check_devices(self, name: str, position: int) -> None:
        arguments = list(on_device(self.op_arguments(CASE)[name], DEVICE))
        arguments[position] = arguments[position].cpu()
        with pytest.raises(RuntimeError, match="expected the device"):
            self.ops[name](*arguments)
