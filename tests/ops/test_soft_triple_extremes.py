"""SoftTriple where classes, labels or vectors are extreme, or nothing counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers import soft_triple_loss
from testing.cases import Case, assert_close, by_dtype
from tests.ops.test_soft_triple import chunk, formula, library, vectors


def test_rows_far_from_other_classes_are_as_exact_as_in_plain_pytorch() -> None:
    """Losses below 1e-3, which a log-sum-exp of 20 would round off, and their gradients."""
    classes, labels = 40, torch.arange(160) % 40
    centers = vectors(classes, 3, 64)
    x = F.normalize(centers[labels, 0], dim=1) + 0.02 * vectors(160, 64)
    errors = []
    exact = Case((x, centers)).to(torch.float64).leaves()
    want = formula(*exact, labels, tau=0, reduction="none")
    assert (want < 1e-3).all()
    expected = (want, *torch.autograd.grad(want.sum(), exact))
    for function in (soft_triple_loss, formula):
        leaves = Case((x, centers)).leaves()
        loss = function(*leaves, labels, tau=0, reduction="none")
        got = (loss, *torch.autograd.grad(loss.sum(), leaves))
        errors.append([((g - w).abs() / w.abs()).median() for g, w in zip(got, expected, strict=True)])
    assert all(mine <= plain for mine, plain in zip(*errors, strict=True))
    assert max(errors[0]) < 2e-5


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_class_only(reduction: str) -> None:
    """No other class: a loss of zero, but for the regulariser, to any order."""
    leaves = Case((vectors(3, 6), vectors(1, 2, 6))).to(torch.float64).leaves()
    labels = torch.tensor([0, -100, 0])

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return soft_triple_loss(x, w, labels, reduction=reduction)

    torch.testing.assert_close(loss(*leaves), formula(*leaves, labels, reduction=reduction))
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_labels_that_are_far_from_all_classes() -> None:
    scores, inverse, _ = chunk()
    extremes = torch.tensor([-(2**63), 2**63 - 1, -100]).repeat(7)[:19]
    for first in (0, 5, -3, 2**62):
        others, target = library.soft_triple_chunk(scores, inverse, extremes, first, 20.0, 0.1, 0.01)
        assert not target.any()
        torch.testing.assert_close(
            others, library.soft_triple_chunk(scores, inverse, extremes * 0 - 1, 0, 20, 0.1, 0)[0]
        )


@by_dtype
def test_coincident_centers_and_embeddings_on_them(dtype: torch.dtype) -> None:
    """Where a class's centers have merged the distances have a slope of their own, and all is finite."""
    w = vectors(4, 1, 48).to(dtype).expand(4, 3, 48).contiguous()
    w[1, 2] *= 2  # the same direction
    x = w[:, 0].clone()
    case = Case((x, w), {"labels": torch.arange(4), "tau": 5.0})
    leaves, exact = case.leaves(), case.to(torch.float64).leaves()
    actual, expected = soft_triple_loss(*leaves, **case.options), formula(*exact, **case.options)
    # The last bit of a cosine of 1 is worth 300 of it in a distance of the root of 1e-5.
    assert_close(actual, expected, torch.promote_types(dtype, torch.float32), scale=10)
    for got in torch.autograd.grad(actual, leaves):
        assert got.isfinite().all()


def test_zero_vectors_have_cosines_and_gradients_of_zero() -> None:
    x, w = vectors(3, 5), vectors(4, 2, 5)
    x[1], w[2, 0] = 0, 1e-13
    leaves = Case((x, w)).to(torch.float64).leaves()
    loss = soft_triple_loss(*leaves, labels=torch.arange(3))
    zeroed = [t.detach().masked_fill(t.detach().norm(dim=-1, keepdim=True) < 1e-12, 0) for t in leaves]
    torch.testing.assert_close(loss, formula(*zeroed, torch.arange(3)))
    grads = torch.autograd.grad(loss, leaves)
    assert not grads[0][1].any()
    assert not grads[1][2, 0].any()
    assert grads[1].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_embeddings_are_seen(value: float) -> None:
    """In the loss, and in its own row's only."""
    x, w, y = vectors(5, 6), vectors(9, 3, 6), torch.arange(5)
    x[3, 2] = value
    each = soft_triple_loss(x, w, y, reduction="none")
    assert each.isfinite().tolist() == [True, True, True, False, True]
    assert soft_triple_loss(x, w, y).isnan()
    # Where it is ignored, it is not.
    y[3] = -100
    assert soft_triple_loss(x, w, y).isfinite()


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counts(rows: int, reduction: str) -> None:
    leaves = Case((vectors(rows, 6), vectors(5, 2, 6))).leaves()
    loss = soft_triple_loss(*leaves, torch.full((rows,), -100), reduction=reduction)
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert not loss.any()
    assert not any(g.any() for g in torch.autograd.grad(loss.sum(), leaves))


def test_float32_under_autocast() -> None:
    """Nothing of it is computed in the dtype of autocast, parameters are not cast, and the loss is float32."""
    x, w, y = vectors(8, 32), vectors(20, 4, 32), torch.arange(8)
    for dtype in (torch.bfloat16, torch.float16):
        leaves = Case((x, w)).leaves()
        with torch.autocast("cpu", dtype=dtype):
            loss = soft_triple_loss(*leaves, y)
            grads = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(grads[1].square().sum(), leaves[0])
        exact = Case((x, w)).to(torch.float64).leaves()
        want = formula(*exact, y)
        first = torch.autograd.grad(want, exact, create_graph=True)
        assert_close(loss, want, torch.float32)
        assert_close(grads[1], first[1], torch.float32)
        assert_close(second[0], torch.autograd.grad(first[1].square().sum(), exact[0])[0], torch.float32, scale=40)
