"""Bit for bit the same: on any number of threads, and for an image or a cloud alone and within a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from paper_layers import knn, lip_pool2d, neighbor_reduce, point_sample, soft_triple_loss, split_batch_norm
from paper_layers.ops.edge_conv import edge_conv
from paper_layers.ops.soft_triple.logits import soft_triple_logits
from paper_layers.ops.spectral_linear import spectral_linear
from paper_layers.ops.uncertain_points.pixels import uncertain_points
from paper_layers.ops.uncertain_points.samples import sample_uncertain_points

THREADS = (1, 2, 3, 4, 8)


@dataclass
class Call:
    """A function and its tensors: those that are split into images or clouds for "alone", and the others."""

    function: Callable[..., Any]
    batched: tuple[Tensor, ...]
    shared: tuple[Tensor, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    alone: bool = True


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def table(*shape: int, rows: int) -> Tensor:
    """Neighbours, most of them of the first tenth of the rows, and a few that are none."""
    index = torch.randint(-1, rows, shape, generator=torch.Generator().manual_seed(rows))
    return torch.where(index % 3 == 0, index, index // 10)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def lip(shape: tuple[int, ...], deviation: float, layout: Callable[[Tensor], Tensor], *window: Any) -> Call:
    return Call(
        lip_pool2d, (layout(normal(*shape)), layout(deviation * normal(*shape, seed=1))), (), window_of(*window)
    )


def window_of(kernel: int, stride: int, padding: int, ceil_mode: bool = False) -> dict[str, Any]:
    return {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}


def loss_of_rows(x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    return soft_triple_loss(x, centers, labels, reduction="none")


def mean_loss(x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    return soft_triple_loss(x, centers, labels, ignore_index=0)


def normalized(x: Tensor, weight: Tensor, bias: Tensor, split_sizes: list[int]) -> tuple[Tensor, ...]:
    running = torch.zeros(2, *weight.shape, dtype=weight.dtype)
    return split_batch_norm(
        x, split_sizes, running_mean=running[0], running_var=running[1], weight=weight, bias=bias
    ), *running


def spectral(x: Tensor, weight: Tensor, bias: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return spectral_linear(x, weight, bias, u=u.detach().clone(), v=v.detach().clone(), training=True)


def drawn_points(logits: Tensor, num_points: int) -> Tensor:
    return sample_uncertain_points(logits, num_points, generator=torch.Generator().manual_seed(0))


def joined_edges(center: Tensor, neighbor: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    return edge_conv(center, neighbor, index, negative_slope=0.2)


def sampled(points: Tensor, *maps: Tensor) -> Tensor:
    return point_sample(list(maps), points)


def norm(shape: tuple[int, ...], sizes: list[int], layout: Callable[[Tensor], Tensor] = Tensor.contiguous) -> Call:
    parameters = normal(2, len(sizes), shape[1]) + 1
    return Call(normalized, (layout(normal(*shape)),), tuple(parameters), {"split_sizes": sizes}, alone=False)


def soft_triple(function: Callable[..., Tensor], rows: int, classes: int, count: int, channels: int) -> Call:
    labels = (torch.arange(rows) * 7) % classes
    centers = normal(classes, count, channels)
    if function is soft_triple_logits:
        return Call(function, (normal(rows, channels),), (centers,), alone=False)
    return Call(function, (normal(rows, channels), labels), (centers,), alone=False)


def linear(rows: int, columns: int, outputs: int) -> Call:
    shared = (normal(outputs, columns), normal(outputs), normal(outputs, seed=1), normal(columns, seed=2))
    return Call(spectral, (normal(rows, columns),), shared, alone=False)


# Rows, classes, centers and channels; the last two of one part of the classes.
SOFT_TRIPLE = ((50, 300, 3, 24), (7, 98, 10, 130), (35, 1000, 2, 64), (9, 1, 4, 700), (300, 2, 5, 700))

CALLS: dict[str, list[Call]] = {
    "lip_pool2d": [
        lip((1, 1, 501, 333), 20, Tensor.contiguous, 3, 2, 1),
        lip((2, 2, 203, 203), 30, Tensor.contiguous, 7, 3, 3, True),
        lip((3, 20, 64, 63), 300, channels_last, 3, 2, 1),
        lip((2, 33, 40, 41), 1, channels_last, 2, 2, 0),
    ],
    "knn": [
        Call(knn, (normal(2, 1500, 3),), (), {"k": 9}),
        Call(knn, (normal(3, 700, 40),), (), {"k": 20, "dilation": 2}),
        Call(knn, (normal(3, 300, 6),), (), {"k": 5, "metric": "inner"}),
    ],
    "neighbor_reduce": [
        Call(neighbor_reduce, (normal(2, 1500, 35), table(2, 1500, 20, rows=1500)), (), {"reduction": reduction})
        for reduction in ("max", "sum", "mean")
    ]
    + [Call(neighbor_reduce, (normal(3, 700, 64), table(3, 700, 9, rows=700)), (), {"relative": True})],
    "edge_conv": [
        # Statistics are of all clouds.
        Call(joined_edges, (*normal(2, 2, 1500, 35), table(2, 1500, 20, rows=1500)), (), alone=False),
        Call(joined_edges, (*normal(2, 3, 700, 64), table(3, 700, 9, rows=700)), (), alone=False),
        Call(lambda *t: joined_edges(*t)[0], (*normal(2, 3, 700, 64), table(3, 700, 9, rows=700))),
    ],
    "point_sample": [
        Call(sampled, (normal(3, 900, 2).sigmoid(), normal(3, 20, 60, 50))),
        Call(sampled, (normal(2, 500, 2) * 1e-3 + 0.5, normal(2, 40, 64, 64), normal(2, 24, 9, 160))),
        Call(sampled, (normal(3, 900, 2).sigmoid(), channels_last(normal(3, 40, 60, 50)))),
    ],
    "uncertain_points": [
        Call(uncertain_points, (normal(3, 5, 64, 100),), (), {"num_points": 500}),
        Call(uncertain_points, (normal(20, 1, 28, 28),), (), {"num_points": 50}),
    ],
    "sample_uncertain_points": [
        # The points of a batch are drawn together.
        Call(drawn_points, (normal(2, 4, 90, 100),), (), {"num_points": 3000}, alone=False),
        Call(drawn_points, (normal(70, 1, 7, 7),), (), {"num_points": 150}, alone=False),
    ],
    "soft_triple_loss": [
        soft_triple(function, *sizes) for function in (loss_of_rows, mean_loss) for sizes in SOFT_TRIPLE
    ],
    "soft_triple_logits": [soft_triple(soft_triple_logits, *sizes) for sizes in SOFT_TRIPLE],
    "split_batch_norm": [
        norm((6, 40, 31, 17), [2, 4]),
        norm((6, 40, 31, 17), [2, 4], channels_last),
        norm((7, 3, 64, 65), [5, 2], channels_last),
        norm((4096, 64), [2048, 2048]),
        norm((300, 2048), [100, 200]),
    ],
    # The products' library may see the number of rows.
    "spectral_linear": [
        linear(*sizes)
        for sizes in (
            *((70, 200, 300), (64, 33, 2000), (16, 4096, 100), (500, 64, 64), (9, 33, 20)),
            *((512, 2048, 1), (1, 3000, 2000), (400, 700, 500)),
        )
    ],
}
CASES = [(name, i) for name, calls in CALLS.items() for i in range(len(calls))]
by_case = pytest.mark.parametrize(("name", "number"), CASES)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@contextmanager
def number_of_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def results(call: Call, batched: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the function's results and the gradients of its tensors."""
    tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in (*batched, *call.shared)]
    got = call.function(*tensors, **call.options)
    outputs = list(got) if isinstance(got, tuple) else [got]
    differentiable = [t for t in outputs if t.requires_grad]
    if not differentiable:
        return outputs, []
    leaves = [t for t in tensors if t.requires_grad]
    grads = [t.detach() / 2 + 1 for t in differentiable]
    return outputs, [t for t in torch.autograd.grad(differentiable, leaves, grads, allow_unused=True) if t is not None]


def cast(call: Call, dtype: torch.dtype) -> Call:
    batched, shared = (
        tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors) for tensors in (call.batched, call.shared)
    )
    return Call(call.function, batched, shared, call.options, call.alone)


@pytest.mark.cpu_only
@by_dtype
@by_case
def test_same_for_any_number_of_threads(name: str, number: int, dtype: torch.dtype) -> None:
    call = cast(CALLS[name][number], dtype)
    expected = None
    for threads in THREADS:
        with number_of_threads(threads):
            outputs, grads = results(call, call.batched)
        expected = expected or (outputs, grads)
        assert [torch.equal(*pair) for pair in zip(outputs, expected[0], strict=True)] == [True] * len(outputs)
        assert [torch.equal(*pair) for pair in zip(grads, expected[1], strict=True)] == [True] * len(grads)


@pytest.mark.cpu_only
@by_dtype
@by_case
def test_same_alone_and_within_a_batch(name: str, number: int, dtype: torch.dtype) -> None:
    call = cast(CALLS[name][number], dtype)
    if not call.alone:
        return
    together, grads = results(call, call.batched)
    mine = len([t for t in call.batched if t.is_floating_point()])  # of the gradients
    for i in range(min(len(call.batched[0]), 9)):
        outputs, own = results(call, tuple(t[i : i + 1] for t in call.batched))
        assert [torch.equal(one, many[i : i + 1]) for one, many in zip(outputs, together, strict=True)] == [True] * len(
            outputs
        )
        pairs = zip(own[:mine], grads[:mine], strict=True)
        assert [torch.equal(one, many[i : i + 1]) for one, many in pairs] == [True] * len(own[:mine])


@pytest.mark.cpu_only
@by_dtype
@pytest.mark.parametrize("number", range(len(CALLS["split_batch_norm"])))
def test_parts_and_channels_of_a_norm_do_not_see_one_another(number: int, dtype: torch.dtype) -> None:
    call = cast(CALLS["split_batch_norm"][number], dtype)
    (x,), parameters, sizes = call.batched, call.shared, call.options["split_sizes"]
    together, grads = results(call, (x,))
    for i, part in enumerate(x.split(sizes)):
        one = Call(normalized, (part,), tuple(p[i : i + 1] for p in parameters), {"split_sizes": sizes[i : i + 1]})
        outputs, own = results(one, (part,))
        assert torch.equal(outputs[0], together[0].split(sizes)[i])
        assert all(torch.equal(alone[0], many[i]) for alone, many in zip(outputs[1:], together[1:], strict=True))
        assert torch.equal(own[0], grads[0].split(sizes)[i])
        assert all(torch.equal(alone[0], many[i]) for alone, many in zip(own[1:], grads[1:], strict=True))
    others = x.clone(memory_format=torch.preserve_format)
    others[:, 1:] = others[:, 1:] * 3 + 1
    assert torch.equal(results(call, (others,))[0][0][:, 0], together[0][:, 0])
