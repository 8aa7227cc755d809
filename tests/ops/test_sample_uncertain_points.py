from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paper_layers import point_sample, sample_uncertain_points
from testing.battery import Battery
from testing.cases import Case, by_dtype, drawn
from tests.ops.test_uncertain_points import LAYOUTS, maps, order

op = torch.ops.paper_layers.sample_uncertain_points.default


def hat(coordinate: Tensor, size: int) -> Tensor:
    """The weights of all pixels along an axis: 1 at a pixel's centre, 0 from the next one on."""
    distance = size * coordinate[..., None].double() - torch.arange(size) - 0.5
    return (1 - distance.abs()).clamp(min=0).nan_to_num(0)


def formula(logits: Tensor, points: Tensor, count: int, labels: Tensor | None = None) -> Tensor:
    """All pixels in the sum, those of weight 0 left out."""
    values = logits.double()
    if labels is not None and values.shape[1] > 1:
        values = values[torch.arange(len(labels)), labels, None]
    weight = hat(points[..., 1], logits.shape[2])[..., None] * hat(points[..., 0], logits.shape[3])[:, :, None]
    terms = (values[:, :, None] * weight[:, None]).where(weight[:, None] > 0, 0)
    return order(terms.sum((3, 4)), count)


def between_centres(*shape: int, seed: int = 0) -> Tensor:
    """Points, some outside, on which products of small integers are exact, and none of which is a pixel's centre."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (2 * torch.randint(-8, 72, (*shape, 2), generator=generator) + 1) / 128


CHANGES = {
    "integers": lambda x: x,
    "constant": lambda x: torch.zeros_like(x) * x.sign(),
    "NaN": lambda x: torch.where(x > 20, torch.nan, x),
    "infinite": lambda x: torch.where(x > 12, torch.inf, torch.where(x < -12, -torch.inf, x)),
    "all infinite": lambda x: torch.full_like(x, torch.inf),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    classes = draw(st.sampled_from([1, 2, 3, 4, 19]))
    height, width = (draw(st.sampled_from([1, 2, 4, 8, 16])) for _ in range(2))
    seed = draw(st.integers(0, 2**20))
    logits = (8 * maps(draw(st.integers(0, 3)), classes, height, width, seed=seed)).round()
    logits = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](CHANGES[draw(st.sampled_from(list(CHANGES)))](logits))
    candidates = draw(st.integers(0, 300))
    points = between_centres(len(logits), candidates, seed=seed)
    if draw(st.booleans()):
        points[:, ::7] = torch.nan
        points[:, 1::9, 0] = torch.inf
        points[:, 2::9, 1] = -1e30
    labels = torch.arange(len(logits)) % classes if draw(st.booleans()) else None
    return Case((logits,), {"points": points, "count": draw(st.integers(0, candidates)), "labels": labels})


def call(**change: Any) -> Any:
    arguments = {"logits": maps(2, 3, 5, 7), "num_points": 4, **change}
    return lambda: sample_uncertain_points(**arguments)


def call_op(**change: Any) -> Any:
    arguments = {"logits": maps(2, 3, 5, 7), "labels": None, "points": torch.rand(2, 9, 2), "count": 4, **change}
    return lambda: op(**arguments)


class TestSampleUncertainPoints(Battery):
    function = staticmethod(lambda logits, points, count, labels=None: op(logits, labels, points, count))
    ops = {"sample_uncertain_points": op}  # noqa: RUF012
    any_of_equals = True
    bad_inputs = {  # noqa: RUF012
        "rank": (call(logits=maps(3, 5, 7)), ValueError, r"logits: expected shape .*got \(3, 5, 7\)"),
        "no classes": (call(logits=maps(2, 0, 5, 7)), ValueError, "logits: .*at least one class"),
        "integers": (call(logits=torch.ones(2, 3, 5, 7).long()), TypeError, "logits: .*torch.int64"),
        "negative": (call(num_points=-1), ValueError, "num_points: expected at least 0, got -1"),
        "float": (call(num_points=2.0), TypeError, "num_points: expected an int, got 2.0"),
        "few candidates": (call(oversample_ratio=0.9), ValueError, "oversample_ratio: expected at least 1, got 0.9"),
        "infinite ratio": (call(oversample_ratio=torch.inf), ValueError, "oversample_ratio: .*got inf"),
        "NaN ratio": (call(oversample_ratio=torch.nan), ValueError, "oversample_ratio: .*got nan"),
        "ratio type": (call(oversample_ratio="3"), TypeError, "oversample_ratio: expected a number, got '3'"),
        "importance": (
            call(importance_sample_ratio=1.5),
            ValueError,
            "importance_sample_ratio: expected from 0 to 1, got 1.5",
        ),
        "importance type": (call(importance_sample_ratio=None), TypeError, "importance_sample_ratio: .*got None"),
        "labels dtype": (call(labels=torch.ones(2)), TypeError, "labels: expected an int64 .*got torch.float32"),
        "labels shape": (call(labels=torch.ones(3).long()), ValueError, r"labels: expected shape \(2,\).*got \(3,\)"),
        "label too large": (call(labels=torch.tensor([0, 3])), RuntimeError, "labels: expected .* 0 to 2, got 3"),
        "generator": (call(generator=5), TypeError, "generator: expected a torch.Generator, got int"),
        "points dtype": (call_op(points=torch.rand(2, 9, 2).double()), RuntimeError, "points: expected float32"),
        "points shape": (call_op(points=torch.rand(3, 9, 2)), RuntimeError, r"points: .*\(2, M, 2\).*\(3, 9, 2\)"),
        "count": (call_op(count=10), RuntimeError, "count: expected from 0 to the number of points, 9, got 10"),
    }

    @staticmethod
    def fixed_cases() -> list[Case]:
        points = between_centres(2, 30)
        return [
            Case((maps(2, 5, 4, 8),), {"points": points, "count": 7}),
            Case((maps(2, 1, 4, 2),), {"points": points, "count": 30}),
            Case((maps(2, 4, 8, 8),), {"points": points, "count": 3, "labels": torch.tensor([3, 0])}),
        ]

    @staticmethod
    def op_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
        options = case.options
        return {
            "sample_uncertain_points": (case.tensors[0], options.get("labels"), options["points"], options["count"])
        }

    @by_dtype
    def test_equals_formula(self, dtype: torch.dtype) -> None:
        """The same points in the same order, ties and all."""

        @drawn
        @given(case=cases())
        def check(case: Case) -> None:
            case = case.to(dtype)
            placed = case.on(self.device)
            index = self.function(*placed.tensors, **placed.options)
            assert torch.equal(index.cpu(), formula(*case.tensors, **case.options))

        check()

    @pytest.mark.tracing
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compile(self, backend: str) -> None:
        """The same points from the same seed."""
        torch._dynamo.reset()
        logits = maps(2, 3, 9, 11).to(self.device).requires_grad_()

        def step(logits: Tensor) -> Tensor:
            return sample_uncertain_points(1.5 * logits, 20)

        with torch._inductor.config.patch(fallback_random=True):
            compiled = torch.compile(step, backend=backend, fullgraph=True)
            torch.manual_seed(3)
            actual = compiled(logits)
        torch.manual_seed(3)
        assert torch.equal(actual, step(logits))


@by_dtype
def test_most_uncertain_of_random_points(dtype: torch.dtype) -> None:
    """Rounding may exchange points that are about equally uncertain, and no others."""
    logits, points = maps(2, 19, 37, 50).to(dtype), torch.rand(2, 5000, 2, generator=torch.Generator().manual_seed(1))
    sampled = point_sample(logits.double(), points)
    best = sampled.topk(2, dim=1).values
    exact = best[:, 1] - best[:, 0]
    index = op(logits, None, points, 700)
    assert all(len(row.unique()) == 700 for row in index)
    torch.testing.assert_close(exact.gather(1, index), exact.topk(700).values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("labels", [None, torch.tensor([2, 0, 4])])
@pytest.mark.parametrize(("oversample", "importance"), [(3.0, 0.75), (1.0, 1.0), (2.3, 0.31), (4, 0)])
def test_official_formula(labels: Tensor | None, oversample: float, importance: float) -> None:
    """The same points from the same generator: candidates first, then the uniform ones; ratios are truncated."""
    logits, num_points = maps(3, 5, 12, 9).double(), 37
    generator = torch.Generator().manual_seed(5)
    candidates = torch.rand(3, int(oversample * num_points), 2, generator=generator)
    count = int(importance * num_points)
    sampled = F.grid_sample(logits, 2 * candidates.double()[:, None] - 1, align_corners=False)[:, :, 0]
    if labels is None:
        best = sampled.topk(2, dim=1).values
        uncertainty = best[:, 1] - best[:, 0]
    else:
        uncertainty = -sampled[torch.arange(3), labels].abs()
    chosen = candidates.gather(1, uncertainty.topk(count).indices[..., None].expand(-1, -1, 2))
    expected = torch.cat([chosen, torch.rand(3, num_points - count, 2, generator=generator)], 1)
    actual = sample_uncertain_points(
        logits,
        num_points,
        labels=labels,
        oversample_ratio=oversample,
        importance_sample_ratio=importance,
        generator=torch.Generator().manual_seed(5),
    )
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_generator() -> None:
    """Its own, or torch's; another seed gives other points."""
    logits = maps(2, 3, 8, 8)
    first, same, other = (
        sample_uncertain_points(logits, 30, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    torch.manual_seed(1)
    default = sample_uncertain_points(logits, 30)
    assert torch.equal(first, same)
    assert torch.equal(first, default)
    assert not torch.equal(first, other)


def test_samples_logits_not_their_uncertainty() -> None:
    """Between -1 and 1 lies 0: there the sampled logit is unsure, and a map of uncertainties is -1 all over."""
    points = torch.tensor([[[0.25, 0.5], [0.5, 0.5], [0.75, 0.5]]])
    assert op(torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2), None, points, 1).tolist() == [[1]]


def test_one_class_needs_no_labels() -> None:
    logits, labels = maps(2, 1, 5, 7), torch.tensor([17, -1])
    points = [
        sample_uncertain_points(logits, 9, labels=given, generator=torch.Generator().manual_seed(0))
        for given in (labels, None)
    ]
    assert torch.equal(*points)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 1, 1, 1)])
@pytest.mark.parametrize("num_points", [0, 1, 50])
def test_few_pixels_and_points(shape: tuple[int, ...], num_points: int) -> None:
    points = sample_uncertain_points(maps(*shape), num_points)
    assert points.shape == (shape[0], num_points, 2)
    assert ((points >= 0) & (points < 1)).all()


def test_no_gradient_flows() -> None:
    assert not sample_uncertain_points(maps(2, 3, 5, 7).requires_grad_(), 4).requires_grad


def test_vmap() -> None:
    logits, points, labels = maps(3, 2, 4, 8, 8), between_centres(3, 2, 40), torch.tensor([[0, 1], [3, 2], [1, 1]])
    many = torch.func.vmap(lambda x, y, p: op(x, y, p, 6))(logits, labels, points)
    one = torch.func.vmap(lambda x: op(x, labels[0], points[0], 6), in_dims=-1)(logits.movedim(0, -1))
    for i in range(3):
        assert torch.equal(many[i], op(logits[i], labels[i], points[i], 6))
        assert torch.equal(one[i], op(logits[i], labels[0], points[0], 6))
    drawn_apart = torch.func.vmap(lambda x: sample_uncertain_points(x, 6), randomness="different")(logits)
    assert drawn_apart.shape == (3, 2, 6, 2)
    assert not torch.equal(drawn_apart[0], drawn_apart[1])


@pytest.mark.tracing
def test_export_of_any_size() -> None:
    class Module(torch.nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return sample_uncertain_points(logits, 6)

    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=2), 3: torch.export.Dim("w", min=2)}
    program = torch.export.export(Module(), (maps(2, 3, 5, 7),), dynamic_shapes=(sizes,))
    other = maps(3, 3, 9, 4)
    torch.manual_seed(2)
    actual = program.module()(other)
    torch.manual_seed(2)
    assert torch.equal(actual, sample_uncertain_points(other, 6))


@pytest.mark.cpu_only
def test_same_for_any_number_of_threads() -> None:
    threads, results = torch.get_num_threads(), []
    one, many = maps(1, 4, 30, 50), maps(70, 2, 7, 7)
    points, more = torch.rand(1, 40000, 2), torch.rand(70, 600, 2)
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append((op(one, None, points, 9000), op(many, None, more, 150)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow_emulated
def test_more_elements_than_32_bits_count() -> None:
    """Only what is sampled of fresh memory takes room."""
    logits = torch.empty(1, 9, 2**14, 2**14, dtype=torch.bfloat16)
    logits[0, 8, -2:, -2:] = torch.nan
    logits[0, 8, :2, :2] = 1
    points = torch.tensor([[[0.5 / 2**14, 0.5 / 2**14], [1 - 0.5 / 2**14, 1 - 0.5 / 2**14]]])
    assert op(logits, torch.tensor([8]), points, 2).tolist() == [[1, 0]]
