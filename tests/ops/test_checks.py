"""Sizes, indices and numbers that all ops treat alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import paper_layers as pl
from tests.ops.test_edge_conv import parts

ops = torch.ops.paper_layers


def test_products_of_sizes_that_wrap() -> None:
    """Without elements nothing is computed, whatever the other sizes are."""
    wide = torch.empty(0, 281479271743489, requires_grad=True)
    assert pl.neighbor_reduce(wide, torch.empty(0, 65535, dtype=torch.int64)).shape == wide.shape
    pl.knn(wide, k=65535)[1].sum().backward()
    assert wide.grad is not None
    loss = pl.soft_triple_loss(torch.ones(3, 1), torch.empty(0, 6148914691236517205, 1), torch.full((3,), -100), tau=0)
    assert loss == 0
    assert ops.split_batch_norm(torch.empty(0, 2**56, 1), [], [], [], 1e-5)[0].shape == (0, 2**56, 1)
    rows = torch.empty(2**48, 0)
    assert pl.edge_conv(rows, rows, torch.empty(2**48, 0, dtype=torch.int64))[0].shape == rows.shape


X = torch.arange(8.0).reshape(2, 4, 1)
NEXT_CLOUD = torch.tensor([[[4], [3], [0], [1]], [[0], [1], [2], [3]]])
NEGATIVE = torch.tensor([[[0], [-2], [0], [1]], [[0], [1], [-1], [3]]])


@pytest.mark.cpu_only
@pytest.mark.parametrize(("index", "wrong"), [(NEXT_CLOUD, "4"), (NEGATIVE, "-2")])
@pytest.mark.parametrize(
    "call",
    [
        pl.neighbor_reduce,
        lambda x, i: pl.edge_conv(x, x, i),
        torch.func.vmap(pl.neighbor_reduce),
        lambda x, i: torch.func.vmap(lambda a, b: pl.edge_conv(a, a, b))(x, i),
        lambda x, i: ops.flat_index(i, 4),
        lambda x, i: ops.knn_backward(torch.ones(2, 4, 1), x, x, i, False),
        lambda x, i: ops.neighbor_reduce_backward(torch.ones(4, 1), i[0], i[0, :0].int(), 4, "sum", False),
    ],
)
def test_index_refuses_other_clouds(call: Callable[..., Any], index: Tensor, wrong: str) -> None:
    with pytest.raises(RuntimeError, match=f"index: expected -1 or a row below 4, got {wrong}"):
        call(X, index)


@pytest.mark.cpu_only
@pytest.mark.parametrize("number", [0.7, torch.nan, torch.inf, -1.0, 2.0, -1e30])
def test_image_number_refuses(number: float) -> None:
    boxes = torch.tensor([[1.0, 0, 0, 4, 4], [number, 0, 0, 4, 4]])
    with pytest.raises(ValueError, match=f"boxes: expected numbers of 2 images, got {number:g}".replace("+", r"\+")):
        pl.point_sample(torch.ones(2, 3, 8, 8), torch.rand(2, 5, 2), boxes=boxes)


@pytest.mark.cpu_only
def test_starts_refuses() -> None:
    x = torch.rand(20, 3)
    for ptr, message in [
        ([0, 12, 5, 20], "got 5 at position 2"),
        ([0, 12, 25], "from 0 to 20, got 0 to 25"),
        ([1, 20], "from 0 to 20, got 1 to 20"),
    ]:
        with pytest.raises(ValueError, match=message):
            pl.knn(x, k=2, ptr=torch.tensor(ptr))
    with pytest.raises(ValueError, match="batch: expected numbers from 0 in ascending order, got 1 at position 15"):
        pl.knn(x, k=2, batch=torch.tensor([0] * 10 + [2] * 5 + [1] * 5))


def test_numbers_of_numpy() -> None:
    n, x, image = np.int64, torch.rand(20, 3), torch.rand(2, 2, 8, 8)
    assert torch.equal(pl.knn(x, k=n(3), dilation=n(2))[0], pl.knn(x, k=3, dilation=2)[0])
    assert torch.equal(pl.uncertain_points(image, n(4))[0], pl.uncertain_points(image, 4)[0])
    assert torch.equal(pl.lip_pool2d(image, image, n(2)), pl.lip_pool2d(image, image, 2))
    assert torch.equal(pl.lip_pool2d(image, image, [n(3)], [2], (1,)), pl.lip_pool2d(image, image, 3, 2, 1))
    assert torch.equal(pl.split_batch_norm(image, np.array([1, 1])), pl.split_batch_norm(image, [1, 1]))
    loss = pl.SoftTripleLoss(n(3), n(4), margin=np.float32(0.5))
    assert (type(loss.num_classes), type(loss.margin)) == (int, float)
    assert type(pl.SplitBatchNorm2d(n(3)).num_features) is int
    for wrong in (np.float64(3.0), np.True_, True, 3.0):
        with pytest.raises(TypeError, match="k: expected an int"):
            pl.knn(x, k=wrong)


def test_int32_indices() -> None:
    x = torch.rand(6, 3)
    index, batch = pl.knn(x, k=2)[0], torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.equal(pl.neighbor_reduce(x, index.int()), pl.neighbor_reduce(x, index))
    assert torch.equal(pl.edge_conv(x, x, index.int())[0], pl.edge_conv(x, x, index)[0])
    for name, value in (("batch", batch), ("ptr", torch.tensor([0, 3, 6]))):
        assert torch.equal(pl.knn(x, k=2, **{name: value.int()})[0], pl.knn(x, k=2, **{name: value})[0])


def test_vmap_of_no_elements() -> None:
    x, index = torch.rand(0, 5, 3), torch.zeros(5, 2, dtype=torch.int64)
    assert torch.func.vmap(lambda a: pl.knn(a, k=2)[1])(x).shape == (0, 5, 2)
    assert torch.func.vmap(lambda a: pl.edge_conv(a, a, index)[0])(x).shape == (0, 5, 3)
    assert torch.func.vmap(lambda a: pl.neighbor_reduce(a, index))(x).shape == (0, 5, 3)


def test_lazy_negative_bit() -> None:
    scores, inverse, grad = torch.rand(6, 4), torch.rand(3, 2), torch.rand(3, 4)
    plain, lazy = scores.clone(), torch._neg_view(-scores)
    want = ops.soft_triple_similarity_backward_(plain, inverse, grad, 0.1)
    assert torch.equal(ops.soft_triple_similarity_backward_(lazy, inverse, grad, 0.1), want)
    assert torch.equal(lazy, plain)


def test_infinite_edges() -> None:
    center = torch.tensor([[0.5, 0, 1], [2.25, 0.5, -0.5], [1, 0.5, 0.5]], dtype=torch.float64)
    neighbor = torch.tensor([[0.5, 0, 1], [torch.inf, 0.5, -0.5]], dtype=torch.float64)
    index, slope = torch.tensor([[1, 0], [0, 0], [-1, 1]]), torch.zeros((), dtype=torch.float64)
    gradients = []
    for function in (parts, lambda c, n, s, i: pl.edge_conv(c, n, i, negative_slope=s)):
        leaves = [t.clone().requires_grad_() for t in (center, neighbor)]
        outputs = function(*leaves, slope, index)
        gradients.append(torch.autograd.grad(sum(o.sum() for o in outputs), leaves))
    torch.testing.assert_close(*gradients, equal_nan=True)
    assert gradients[0][0][:, 0].isnan().all()


@pytest.mark.cpu_only
def test_errors_within_threads_say_why() -> None:
    index = torch.zeros(3, 4, 2, dtype=torch.int64)
    index[1, 2, 1] = 7
    with pytest.raises(RuntimeError, match="got 7"):
        ops.flat_index(index, 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    image, labels = torch.rand(3, 4, 8, 8), torch.tensor([2, 0, 3])
    want = pl.uncertain_points(image, 4, labels=labels)
    assert torch.equal(pl.uncertain_points(image, 4, labels=labels.to(dtype)).indices, want.indices)
    embeddings, centers = torch.rand(3, 5), torch.rand(4, 2, 5)
    want_loss = pl.soft_triple_loss(embeddings, centers, labels)
    assert torch.equal(pl.soft_triple_loss(embeddings, centers, labels.to(dtype)), want_loss)
