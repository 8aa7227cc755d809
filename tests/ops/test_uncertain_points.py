from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paper_layers import uncertain_points
from testing.battery import Battery
from testing.cases import Case, by_dtype, drawn, on_device

op = torch.ops.paper_layers.uncertain_points.default


def order(values: Tensor, num_points: int) -> Tensor:
    """(N, C, M) exact values of the logits at M points -> the most uncertain, in NumPy: NaN, then the least margin."""
    array = values.numpy()
    if array.shape[1] == 1:
        margin = numpy.abs(array[:, 0])
    else:
        ranked = numpy.sort(array, axis=1)  # NaN last
        with numpy.errstate(invalid="ignore"):
            margin = ranked[:, -1] - ranked[:, -2]
    margin = numpy.where(numpy.isnan(margin), -1, margin)
    return torch.from_numpy(numpy.argsort(margin, axis=1, kind="stable")[:, :num_points])


def formula(logits: Tensor, num_points: int, labels: Tensor | None = None) -> Tensor:
    """Half types as float32: their margins round there."""
    values = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(2)
    if labels is not None and values.shape[1] > 1:
        values = values[torch.arange(len(labels)), labels, None]
    return order(values.contiguous(), num_points)


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


CHANGES = {
    "plain": lambda x: x,
    "ties": lambda x: x.round(),
    "constant": lambda x: torch.zeros_like(x) * x.sign(),  # zeros of both signs
    "NaN": lambda x: torch.where(x > 1.5, torch.nan, x),
    "all NaN": lambda x: torch.full_like(x, torch.nan),
    "infinite": lambda x: torch.where(x > 1, torch.inf, torch.where(x < -1, -torch.inf, x)),
    "all infinite": lambda x: torch.full_like(x, -torch.inf),
    "ascending": lambda x: x.flatten().sort().values.view_as(x),
    "descending": lambda x: x.flatten().abs().sort(descending=True).values.view_as(x),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every_other": lambda x: torch.stack([x, x], -1)[..., 0],
    "some_classes": lambda x: torch.cat([x[:, :1], x, x], 1)[:, 1 : 1 + x.shape[1]],
    "expanded": lambda x: x[:, :, :1, :1].expand(x.shape),
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    classes = draw(st.sampled_from([1, 2, 3, 4, 19, 90]))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    logits = maps(draw(st.integers(0, 3)), classes, height, width, seed=draw(st.integers(0, 2**20)))
    logits = CHANGES[draw(st.sampled_from(list(CHANGES)))](logits)
    logits = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](logits)
    labels = torch.arange(len(logits)) % classes if draw(st.booleans()) else None
    return Case((logits,), {"num_points": draw(st.integers(0, height * width + 5)), "labels": labels})


def call(**change: Any) -> Any:
    arguments = {"logits": maps(2, 3, 5, 7), "num_points": 4, **change}
    return lambda: uncertain_points(**arguments)


class TestUncertainPoints(Battery):
    function = staticmethod(lambda *tensors, **options: uncertain_points(*tensors, **options)[0])
    ops = {"uncertain_points": op}  # noqa: RUF012
    any_of_equals = True
    bad_inputs = {  # noqa: RUF012
        "rank": (call(logits=maps(3, 5, 7)), ValueError, r"logits: expected shape .*got \(3, 5, 7\)"),
        "no classes": (call(logits=maps(2, 0, 5, 7)), ValueError, "logits: .*at least one class"),
        "integers": (call(logits=torch.ones(2, 3, 5, 7).long()), TypeError, "logits: .*torch.int64"),
        "not a tensor": (call(logits=[1.0]), TypeError, "logits: expected a Tensor, got list"),
        "negative": (call(num_points=-1), ValueError, "num_points: expected at least 0, got -1"),
        "float": (call(num_points=2.0), TypeError, "num_points: expected an int, got 2.0"),
        "labels dtype": (call(labels=torch.ones(2)), TypeError, "labels: expected an int64 .*got torch.float32"),
        "labels shape": (call(labels=torch.ones(3).long()), ValueError, r"labels: expected shape \(2,\).*got \(3,\)"),
        "labels device": (call(labels=torch.ones(2).long().to("meta")), ValueError, "labels: .*cpu, got meta"),
        "label too large": (call(labels=torch.tensor([0, 3])), RuntimeError, "labels: expected .* 0 to 2, got 3"),
        "label negative": (call(labels=torch.tensor([-1, 0])), RuntimeError, "labels: expected .* 0 to 2, got -1"),
    }

    @staticmethod
    def fixed_cases() -> list[Case]:
        return [
            Case((maps(2, 5, 6, 9),), {"num_points": 7}),
            Case((maps(2, 1, 4, 3).contiguous(memory_format=torch.channels_last),), {"num_points": 40}),
            Case((maps(3, 4, 5, 5),), {"num_points": 3, "labels": torch.tensor([3, 0, 1])}),
        ]

    @staticmethod
    def op_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
        return {"uncertain_points": (case.tensors[0], case.options.get("labels"), case.options["num_points"])}

    @by_dtype
    def test_equals_formula(self, dtype: torch.dtype) -> None:
        """The same pixels in the same order, ties and all, and their centres."""

        @drawn
        @given(case=cases())
        def check(case: Case) -> None:
            case = case.to(dtype)
            placed = case.on(self.device)
            index, points = (t.cpu() for t in uncertain_points(*placed.tensors, **placed.options))
            assert torch.equal(index, formula(*case.tensors, **case.options))
            height, width = case.tensors[0].shape[2:]
            y, x = index.div(width, rounding_mode="floor"), index.remainder(width)
            assert points.dtype == torch.float32
            exact = torch.stack([(x + 0.5).double() / width, (y + 0.5).double() / height], -1)
            torch.testing.assert_close(points.double(), exact, rtol=1e-6, atol=0)

        check()

    @by_dtype
    @pytest.mark.parametrize("change", list(CHANGES))
    @pytest.mark.parametrize("num_points", [1, 300, 9000, 70000])
    def test_large_map_equals_formula(self, dtype: torch.dtype, change: str, num_points: int) -> None:
        """More pixels than one block has, few and many of which are wanted."""
        logits = CHANGES[change](maps(1, 3, 300, 500)).to(dtype)
        for label in (None, torch.tensor([1])):
            index = op(*on_device((logits, label), self.device), num_points)
            assert torch.equal(index.cpu(), formula(logits, num_points, label))

    @pytest.mark.tracing
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compile(self, backend: str) -> None:
        for case in self.placed_cases() if backend == "aot_eager" else self.placed_cases()[:1]:
            torch._dynamo.reset()

            def step(logits: Tensor, case: Case = case) -> tuple[Tensor, ...]:
                return uncertain_points(1.5 * logits, **case.options)

            compiled = torch.compile(step, backend=backend, fullgraph=True)
            for got, want in zip(compiled(*case.leaves()), step(*case.tensors), strict=True):
                torch.testing.assert_close(got, want)
                assert got.stride() == want.stride()


def test_equals_topk() -> None:
    """Where nothing is tied, what the formula in torch finds."""
    logits = maps(2, 19, 60, 80)
    best = logits.topk(2, dim=1).values
    expected = (best[:, 1] - best[:, 0]).flatten(1).topk(300)
    assert torch.equal(uncertain_points(logits, 300)[0], expected.indices)
    single = logits[:, :1]
    assert torch.equal(uncertain_points(single, 300)[0], (-single.abs()).flatten(1).topk(300).indices)


def test_infinite_margins() -> None:
    """An infinite margin is the least uncertain, unless it is inf - inf: NaN, which comes first as in topk."""
    inf = torch.inf
    logits = torch.tensor([[0.0, inf, inf, -inf, 1.0, 0.0], [2.0, 0.0, inf, -inf, -inf, torch.nan]]).view(1, 2, 1, 6)
    assert uncertain_points(logits, 9)[0].tolist() == [[2, 3, 5, 0, 1, 4]]


def test_one_class_needs_no_labels() -> None:
    """As of the masks of a class-agnostic head: the boxes' classes do not matter."""
    logits = maps(2, 1, 5, 7)
    labels = torch.tensor([17, -1])
    assert torch.equal(uncertain_points(logits, 9, labels=labels)[0], uncertain_points(logits, 9)[0])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 5, 0), (2, 1, 1, 1)])
def test_few_pixels(shape: tuple[int, ...]) -> None:
    index, points = uncertain_points(maps(*shape), 4)
    count = min(4, shape[2] * shape[3])
    assert (index.shape, points.shape) == ((shape[0], count), (shape[0], count, 2))
    assert (points == 0.5).all()
    assert uncertain_points(maps(*shape), 0)[1].shape == (shape[0], 0, 2)


def test_no_gradient_flows() -> None:
    logits = maps(2, 3, 5, 7).requires_grad_()
    index, points = uncertain_points(logits, 4)
    assert not index.requires_grad
    assert not points.requires_grad
    tangent = torch.func.jvp(lambda x: uncertain_points(x, 4)[1], (logits.detach(),), (torch.ones(2, 3, 5, 7),))[1]
    assert not tangent.any()


def test_vmap() -> None:
    logits, labels = maps(3, 2, 4, 5, 7), torch.tensor([[0, 1], [3, 2], [1, 1]])
    expected = torch.stack([uncertain_points(x, 6)[0] for x in logits])
    assert torch.equal(
        torch.func.vmap(lambda x: uncertain_points(x, 6)[0], in_dims=-1)(logits.movedim(0, -1)), expected
    )
    both = torch.func.vmap(lambda x, y: uncertain_points(x, 6, labels=y))(logits, labels)
    for i in range(3):
        for got, want in zip(both, uncertain_points(logits[i], 6, labels=labels[i]), strict=True):
            assert torch.equal(got[i], want)

    def loss(x: Tensor) -> Tensor:
        return x.flatten(2).gather(2, uncertain_points(x, 6)[0][:, None].expand(-1, 4, -1)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(logits)
    assert torch.equal(gradients, torch.stack([torch.func.grad(loss)(x) for x in logits]))


@pytest.mark.tracing
def test_export_of_any_size() -> None:
    class Module(torch.nn.Module):
        def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
            return uncertain_points(logits, 6)

    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=3), 3: torch.export.Dim("w", min=3)}
    program = torch.export.export(Module(), (maps(2, 3, 5, 7),), dynamic_shapes=(sizes,))
    other = maps(3, 3, 9, 4)
    for got, want in zip(program.module()(other), uncertain_points(other, 6), strict=True):
        assert torch.equal(got, want)


def test_onnx() -> None:
    """Ties too are taken by index there."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    class Module(torch.nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            return *uncertain_points(logits, 9), *uncertain_points(logits, 9, labels=labels)

    logits, labels = maps(2, 3, 6, 7).round(), torch.tensor([2, 0])
    program = torch.onnx.export(Module().eval(), (logits, labels), dynamo=True, verbose=False)
    assert program is not None
    evaluator = ReferenceEvaluator(onnx.load_from_string(program.model_proto.SerializeToString()))
    inputs = dict(zip(evaluator.input_names, (logits.numpy(), labels.numpy()), strict=True))
    for got, want in zip(evaluator.run(None, inputs), Module()(logits, labels), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want)


@pytest.mark.cpu_only
def test_same_for_any_number_of_threads() -> None:
    threads, results = torch.get_num_threads(), []
    one, many = maps(1, 4, 300, 500).round(decimals=1), maps(7, 1, 100, 120)
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append((uncertain_points(one, 5000)[0], uncertain_points(many, 700)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow_emulated
def test_more_elements_than_32_bits_count() -> None:
    """Fresh memory is zeros that take no room until they are written; only the last class is read."""
    logits = torch.empty(1, 9, 2**14, 2**14, dtype=torch.bfloat16)
    assert logits[0, 8].storage_offset() >= 2**31
    logits[0, 8, -1, -1] = torch.nan
    logits[0, 8, 0, :3] = 1
    index = uncertain_points(logits, 3, labels=torch.tensor([8]))[0]
    assert index.tolist() == [[2**28 - 1, 3, 4]]
