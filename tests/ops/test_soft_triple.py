from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paper_layers import soft_triple_loss
from paper_layers.ops.soft_triple import chunk_ops
from paper_layers.ops.soft_triple import logits as logits_module
from paper_layers.ops.soft_triple import loss as soft_triple_module
from paper_layers.ops.soft_triple import rows as rows_module
from paper_layers.ops.soft_triple.logits import soft_triple_logits
from paper_layers.ops.soft_triple.loss import soft_triple
from paper_layers.ops.soft_triple.rows import reduce_rows
from testing import raw_ops
from testing.battery import OpBattery
from testing.cases import Case, assert_close, by_dtype, drawn
from testing.counting import dispatched_ops

library = torch.ops.paper_layers


def relaxed(embeddings: Tensor, centers: Tensor, gamma: float) -> Tensor:
    """Equation 5, from normalised vectors and all their cosines."""
    s = torch.einsum("bd,ckd->bck", F.normalize(embeddings, dim=1), F.normalize(centers, dim=2))
    return ((s / gamma).softmax(2) * s).sum(2)


def formula(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    la: float = 20.0,
    gamma: float = 0.1,
    tau: float = 0.2,
    margin: float = 0.01,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """Equation 9: cross entropy with a margin, and the distances pair by pair."""
    classes, count, _ = centers.shape
    labels = labels.long()
    kept = labels != ignore_index
    own = F.one_hot(torch.where(kept, labels, 0), classes).to(embeddings.dtype)
    logits = la * (relaxed(embeddings, centers, gamma) - margin * own)
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    regulariser = centers.sum() * 0
    unit = F.normalize(centers, dim=2)
    for j, k in itertools.combinations(range(count), 2):
        distance = (2 + 1e-5 - 2 * (unit[:, j] * unit[:, k]).sum(1)).sqrt().sum()
        regulariser = regulariser + tau * distance / (classes * count * (count - 1))
    if reduction == "none":
        return (loss + regulariser) * kept
    if reduction == "sum":
        return loss.sum() + regulariser * bool(kept.any())
    return loss.sum() / max(1, int(kept.sum())) + regulariser * bool(kept.any())


def vectors(*shape: int, seed: int = 0) -> Tensor:
    """Vectors of lengths from a half to two."""
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    x = F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)
    return (x * (2 * torch.rand(*shape[:-1], 1, generator=generator) - 1).exp2()).float()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, classes, channels = draw(st.integers(0, 40)), draw(st.integers(1, 70)), draw(st.integers(2, 80))
    count = draw(st.sampled_from([1, 2, 3, 5, 10, 17]))
    seed = draw(st.integers(0, 2**20))
    embeddings, centers = vectors(rows, channels, seed=seed), vectors(classes, count, channels, seed=seed + 1)
    layout = draw(st.sampled_from(["contiguous", "contiguous", "transposed", "expanded", "offset"]))
    if layout == "transposed":
        embeddings, centers = embeddings.mT.contiguous().mT, centers.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded":
        embeddings, centers = embeddings[:1].expand(embeddings.shape), centers[:1].expand(centers.shape)
    elif layout == "offset":
        embeddings, centers = F.pad(embeddings, (1, 2))[:, 1:-2], F.pad(centers, (3, 0))[..., 3:]
    ignore_index = draw(st.sampled_from([-100, -1, 0]))
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    labels[:: draw(st.integers(1, 5))] = ignore_index
    options = {
        "labels": labels.to(draw(st.sampled_from([torch.int64, torch.int32]))),
        "la": draw(st.sampled_from([20.0, 1.0, 100.0])),
        "gamma": draw(st.sampled_from([0.1, 1.0, 0.02])),
        "tau": draw(st.sampled_from([0.2, 0.0, 3.0])),
        "margin": draw(st.sampled_from([0.01, 0.0, 0.5])),
        "ignore_index": ignore_index,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "chunk_size": draw(st.sampled_from([None, 1, 7, 33])),
    }
    return Case((embeddings, centers), options)


def call(**change: Any) -> Any:
    arguments = {"embeddings": vectors(4, 8), "centers": vectors(5, 2, 8), "labels": torch.arange(4), **change}
    return lambda: soft_triple_loss(**arguments)


def chunk(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of 37 classes of three centers, their inverse lengths, and labels from class 5 on."""
    centers, embeddings = vectors(37, 3, 8).to(dtype), vectors(19, 8).to(dtype)
    labels = torch.arange(19) * 2 + 1
    return centers.flatten(0, 1) @ embeddings.mT, chunk_ops.inverse_length(centers)[..., 0], labels


class TestSoftTriple(OpBattery):
    function = staticmethod(soft_triple_loss)
    formula = staticmethod(formula)
    cases = staticmethod(cases)
    grad_scale = 40.0  # slopes of la and 1 / gamma
    ops = {  # noqa: RUF012
        name: getattr(library, name).default
        for name in (
            "soft_triple_centers",
            "soft_triple_add_centers_",
            "soft_triple_chunk",
            "soft_triple_chunk_backward_",
            "soft_triple_similarity",
            "soft_triple_similarity_backward_",
        )
    }
    bad_inputs = {  # noqa: RUF012
        "label": (call(labels=torch.tensor([0, 5, 1, 2])), ValueError, "labels: expected classes from 0 to 4.*got 5"),
        "negative": (call(labels=torch.tensor([0, -1, 1, 2])), ValueError, "labels: .*ignore_index, -100, got -1"),
        "labels' dtype": (call(labels=torch.zeros(4)), TypeError, "labels: expected an int64 Tensor, got torch.float"),
        "labels' shape": (call(labels=torch.arange(3)), ValueError, r"labels: expected shape \(4,\), got \(3,\)"),
        "labels' device": (call(labels=torch.arange(4).to("meta")), ValueError, "labels: expected the device"),
        "integers": (call(embeddings=torch.ones(4, 8).int()), TypeError, "embeddings: .*torch.int32"),
        "rank": (call(embeddings=vectors(4, 1, 8)), ValueError, r"embeddings: expected shape \(B, 8\).*got \(4, 1, 8"),
        "size": (call(embeddings=vectors(4, 7)), ValueError, r"embeddings: expected shape \(B, 8\).*got \(4, 7\)"),
        "centers' rank": (call(centers=vectors(10, 8)), ValueError, "centers: expected shape"),
        "no centers": (call(centers=torch.ones(5, 0, 8)), ValueError, "centers: .*K at least 1"),
        "device": (call(centers=vectors(5, 2, 8).to("meta")), ValueError, "centers: .*cpu, got meta"),
        "gamma": (call(gamma=0), ValueError, "gamma: expected more than 0, got 0"),
        "gamma is NaN": (call(gamma=float("nan")), ValueError, "gamma: expected more than 0, got nan"),
        "la": (call(la="20"), TypeError, "la: expected a number, got '20'"),
        "tau": (call(tau=-1.0), ValueError, "tau: expected at least 0, got -1.0"),
        "margin": (call(margin=None), TypeError, "margin: expected a number"),
        "reduction": (call(reduction="max"), ValueError, "reduction: expected one of mean, sum, none, got 'max'"),
        "ignore_index": (call(ignore_index=None), TypeError, "ignore_index: expected an int"),
        "chunk_size": (call(chunk_size=0), ValueError, "chunk_size: expected at least 1, got 0"),
    }

    @staticmethod
    def output_dtype(dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    @staticmethod
    def fixed_cases() -> list[Case]:
        labels = torch.tensor([2, 0, -100, 4, 1])
        return [
            Case((vectors(5, 6), vectors(5, 3, 6)), {"labels": labels, "chunk_size": 2}),
            Case((vectors(5, 6), vectors(5, 1, 6)), {"labels": labels, "reduction": "none", "margin": 0.2}),
        ]

    def maps(self, case: Case) -> list[Callable[..., Any]]:
        labels = case.options["labels"].clamp(min=0)
        return [lambda x, w: soft_triple(x, w, labels), soft_triple_logits]

    @staticmethod
    def op_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
        centers = case.tensors[1]
        inverse, _, pull = library.soft_triple_centers(centers, True)
        (scores, lengths, labels), factors = chunk(), (20.0, 0.1, 0.01)
        rows, one = scores[0], torch.ones((), dtype=centers.dtype)
        return {
            "soft_triple_centers": (centers, True),
            "soft_triple_add_centers_": (centers + 1, centers, inverse, inverse + 1, pull, one),
            "soft_triple_chunk": (scores, lengths, labels, 5, *factors),
            "soft_triple_chunk_backward_": (scores + 0, lengths, labels, 5, rows + 20, rows, rows + 1, *factors),
            "soft_triple_similarity": (scores, lengths, 0.1),
            "soft_triple_similarity_backward_": (scores + 0, lengths, scores[: len(lengths)] + 0, 0.1),
        }

    def raw_calls(self) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        """And the ops on all classes, which have kernels on the CPU alone."""
        yield from super().raw_calls()
        for name, arguments in whole_arguments().items():
            if raw_ops.has_kernel(name, self.device):
                yield name, getattr(library, name).default, arguments


def test_opcheck_of_the_whole() -> None:
    x, w, y = vectors(5, 6), vectors(7, 3, 6), torch.tensor([2, 0, -1, 4, 9])
    factors = (20.0, 0.1, 0.01)
    torch.library.opcheck(library.soft_triple_labels.default, (y, 10, -1))
    torch.library.opcheck(library.soft_triple.default, (x, w, y, *factors, True, 2))
    logsumexp, target, distance, inverse, pull = library.soft_triple(x, w, y, *factors, True, 2)
    grads = (target, logsumexp, distance)
    torch.library.opcheck(
        library.soft_triple_backward.default, (*grads, x, w, y, logsumexp, inverse, pull, *factors, 2)
    )
    for weights, reduction in ((None, "mean"), (target.cos(), "none")):
        rows = (logsumexp, target, distance, weights, y, 0.1, reduction)
        torch.library.opcheck(library.soft_triple_reduce.default, rows)
        grad = library.soft_triple_reduce(*rows)
        torch.library.opcheck(library.soft_triple_reduce_backward.default, (grad, *rows))
    torch.library.opcheck(library.soft_triple_logits.default, (x, w, 20.0, 0.1, 2))
    logits, inverse = library.soft_triple_logits(x, w, 20.0, 0.1, 2)
    torch.library.opcheck(library.soft_triple_logits_backward.default, (logits, x, w, inverse, 20.0, 0.1, 2))


def whole_arguments() -> dict[str, tuple[Any, ...]]:
    """Those of the ops on all classes: some of the labels are none of theirs."""
    x, w = vectors(5, 6).double(), vectors(37, 3, 6).double()
    y, factors = torch.tensor([2, 0, -1, 36, 40]), (20.0, 0.1, 0.01)
    logsumexp, target, distance, inverse, pull = library.soft_triple(x, w, y, *factors, True, 8)
    saved = (x, w, y, logsumexp, inverse, pull)
    logits, lengths = library.soft_triple_logits(x, w, 20.0, 0.1, 8)
    excesses = torch.tensor([-torch.inf, -800.0, -40.0, -9.0, 0.0, 3.0, 79.0, 81.0, 900.0, torch.inf, torch.nan])
    rows = (excesses, torch.zeros_like(excesses), torch.ones(()), excesses.cos(), torch.arange(11) - 1, 0.1, "none")
    return {
        "soft_triple_reduce": rows,
        "soft_triple_reduce_backward": (excesses.nan_to_num().sin(), *rows),
        "soft_triple_logits": (x, w, 20.0, 0.1, 8),
        "soft_triple_logits_backward": (logits.cos(), x, w, lengths, 20.0, 0.1, 8),
        "soft_triple": (x, w, y, *factors, True, 8),
        "soft_triple_backward": (target, logsumexp, distance, *saved, *factors, 8),
    }


WHOLE = ("soft_triple", "soft_triple_backward", "soft_triple_reduce", "soft_triple_reduce_backward")
LOGITS = ("soft_triple_logits", "soft_triple_logits_backward")


@pytest.mark.parametrize("name", [*TestSoftTriple.ops, *WHOLE, *LOGITS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernels_equal_their_references(name: str, dtype: torch.dtype) -> None:
    """The references are what other devices run."""
    references = {
        "soft_triple_centers": chunk_ops._centers,
        "soft_triple_add_centers_": chunk_ops._add_centers,
        "soft_triple_chunk": chunk_ops._forward,
        "soft_triple_chunk_backward_": chunk_ops._backward,
        "soft_triple_similarity": chunk_ops._similarity,
        "soft_triple_similarity_backward_": chunk_ops._similarity_backward,
        "soft_triple": soft_triple_module._forward,
        "soft_triple_backward": soft_triple_module._backward,
        "soft_triple_reduce": rows_module._reference,
        "soft_triple_reduce_backward": rows_module._backward_reference,
        "soft_triple_logits": logits_module._logits,
        "soft_triple_logits_backward": logits_module._logits_backward,
    }
    given = (TestSoftTriple.op_arguments(Case((vectors(5, 6), vectors(37, 3, 6)))) | whole_arguments())[name]

    def arguments(dtype: torch.dtype) -> list[Any]:
        return [a.to(dtype, copy=True) if isinstance(a, Tensor) and a.is_floating_point() else a for a in given]

    mine, exact = arguments(dtype), arguments(torch.float64)
    got, want = getattr(library, name)(*mine), references[name](*exact)
    # Arguments that are written in place count, too.
    for a, b in zip([*_flat(got), mine[0]], [*_flat(want), exact[0]], strict=True):
        assert_close(a, b, dtype, scale=100)


def _flat(result: Any) -> list[Tensor]:
    return [] if result is None else list(result) if isinstance(result, tuple) else [result]


@by_dtype
@pytest.mark.parametrize("count", [1, 3])
def test_logits(dtype: torch.dtype, count: int) -> None:
    case = Case((vectors(21, 9), vectors(35, count, 9))).to(dtype)
    leaves, exact = case.leaves(), case.to(torch.float64).leaves()
    actual, expected = soft_triple_logits(*leaves, chunk_size=8), 20 * relaxed(*exact, 0.1)
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(actual, expected, dtype, scale=10)
    grad = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    grads = torch.autograd.grad(actual, leaves, grad.to(actual.dtype))
    for got, want in zip(grads, torch.autograd.grad(expected, exact, grad), strict=True):
        assert_close(got, want, dtype, scale=1000)


@pytest.mark.tracing
def test_logits_to_second_order_compiled_and_mapped() -> None:
    leaves = Case((vectors(3, 4), vectors(5, 2, 4))).to(torch.float64).leaves()
    assert torch.autograd.gradcheck(lambda x, w: soft_triple_logits(x, w, chunk_size=2), leaves)
    assert torch.autograd.gradgradcheck(lambda x, w: soft_triple_logits(x, w, chunk_size=2), leaves)
    compiled = torch.compile(soft_triple_logits, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), 20 * relaxed(*leaves, 0.1))
    mapped = torch.func.vmap(soft_triple_logits, in_dims=(0, None))(torch.stack([leaves[0], -leaves[0]]), leaves[1])
    torch.testing.assert_close(mapped[1], 20 * relaxed(-leaves[0], leaves[1], 0.1))


@given(split=st.integers(0, 9), seed=st.integers(0, 99))
@drawn
def test_parts_of_the_classes_make_the_whole(split: int, seed: int) -> None:
    """A loss over several ranks relies on this, also where a rank has no class."""
    x, w, y = vectors(6, 5, seed=seed).double(), vectors(9, 2, 5, seed=seed).double(), torch.arange(6) + seed % 4
    parts = [soft_triple(x, w[:split], y), soft_triple(x, w[split:], y - split)]
    others, target, distance = (torch.stack(values) for values in zip(*parts, strict=True))
    joint = (others.logsumexp(0), target.sum(0), distance.sum(), y)
    loss = reduce_rows(*joint, regulariser=0.2 / (9 * 2), reduction="mean")
    torch.testing.assert_close(loss, formula(x, w, y))


def test_ops_that_write_take_tensors_with_a_negative_bit() -> None:
    for name, arguments in TestSoftTriple.op_arguments(Case((vectors(5, 6), vectors(37, 3, 6)))).items():
        if not name.endswith("_"):
            continue
        plain = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        lazy = [torch._neg_view(-a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        want, got = getattr(library, name)(*plain), getattr(library, name)(*lazy)
        assert got is None or torch.equal(got, want)
        assert torch.equal(lazy[0], plain[0])


@pytest.mark.tracing
def test_few_ops_on_a_gpu() -> None:
    """There the walk over the classes is Python's; Stanford Online Products has so many."""
    x, w = torch.empty(256, 512, device="meta"), torch.empty(11318, 10, 512, device="meta")
    y, factors = torch.empty(256, dtype=torch.int64, device="meta"), (20.0, 0.1, 0.01)

    def run() -> None:
        others, target, distance, inverse, pull = soft_triple_module._forward(x, w, y, *factors, True, 0)
        rows = (others, target, distance, None, y, 0.1, "mean")
        of_others, of_target, of_distance, _ = library.soft_triple_reduce_backward(
            library.soft_triple_reduce(*rows), *rows
        )
        grads = (of_others, of_target, of_distance)
        soft_triple_module._backward(*grads, x, w, y, others, inverse, pull, *factors, 0)

    names = dispatched_ops(run)
    assert len(names) <= 60, names


def test_memory_is_that_of_a_chunk(tmp_path: Path) -> None:
    """Alive at a time, beside the gradients: less than a tenth of the B x C x K scores."""
    rows, classes, count, channels = 64, 2000, 8, 16
    leaves = Case((vectors(rows, channels), vectors(classes, count, channels))).leaves()
    labels = torch.arange(rows)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        grads = torch.autograd.grad(soft_triple_loss(*leaves, labels, chunk_size=50), leaves)
    trace = tmp_path / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    held = itertools.accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"]))
    saved = 4 * classes * count * (count + 1)  # inverse lengths and pulls, to which autograd makes gradients of zero
    beside = max(held) - sum(4 * g.numel() for g in grads) - 2 * saved
    assert 50 * rows * count * 4 <= beside < 0.1 * (4 * rows * classes * count)


@pytest.mark.cpu_only
def test_same_for_any_number_of_threads() -> None:
    leaves, y = Case((vectors(50, 24), vectors(300, 3, 24))).leaves(), torch.arange(50)
    runs: list[tuple[Tensor, ...]] = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        loss = soft_triple_loss(*leaves, y, chunk_size=128)
        runs.append((loss, *torch.autograd.grad(loss, leaves)))
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.cpu_only
def test_kernels_check_what_they_are_handed() -> None:
    scores, inverse, labels = chunk()
    rows, factors = scores[0], (20.0, 0.1, 0.01)
    one, w = torch.ones((), dtype=torch.float64), vectors(37, 3, 8).double()
    pull = torch.zeros(37, 3, 3, dtype=torch.float64)
    for message, bad in {
        "scores: expected contiguous": lambda: library.soft_triple_chunk(scores[1:], inverse, labels, 0, *factors),
        "labels: expected int64": lambda: library.soft_triple_chunk(scores, inverse, labels[1:], 0, *factors),
        "inverse: expected the dtype": lambda: library.soft_triple_chunk(scores, inverse.float(), labels, 0, *factors),
        "grad_target: expected shape": lambda: library.soft_triple_chunk_backward_(
            scores, inverse, labels, 0, rows, rows, rows[1:], *factors
        ),
        "grad: expected shape": lambda: library.soft_triple_similarity_backward_(scores, inverse, scores, 0.1),
        "centers: expected shape .C, K, d.": lambda: library.soft_triple_centers(rows, True),
        "pull: expected shape": lambda: library.soft_triple_add_centers_(w, w, inverse, inverse, pull[1:], one),
        "embeddings: expected shape": lambda: library.soft_triple(w, w, labels, *factors, True, 0),
        "centers: expected shape": lambda: library.soft_triple(w[:, 0, 1:], w, labels, *factors, True, 0),
        "labels: expected int64 of shape": lambda: library.soft_triple(w[:, 0], w, labels, *factors, True, 0),
        "grad_logsumexp: expected shape": lambda: library.soft_triple_backward(
            rows[1:], rows, one, w[:19, 0], w, labels, rows, inverse, pull, *factors, 0
        ),
        "logsumexp: expected Double": lambda: library.soft_triple_backward(
            rows, rows, one, w[:19, 0], w, labels, rows.float(), inverse, pull, *factors, 0
        ),
        "not implemented for 'BFloat16'": lambda: library.soft_triple_centers(w.bfloat16(), True),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            bad()
