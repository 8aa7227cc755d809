"""The op that moves running statistics, against torch's batch norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paper_layers.ops import running_statistics
from paper_layers.ops.running_statistics import Running, move_running_statistics
from testing import raw_ops
from testing.cases import by_dtype, on_device

OP: Any = torch.ops.paper_layers.move_running_statistics_.default
BY_MOMENTUM = pytest.mark.parametrize("momentum", [0.1, 0.7, None])
BY_COUNTS = pytest.mark.parametrize("counted", [False, True], ids=["ints", "tensor"])


def norms(count: int, channels: int, momentum: float | None = 0.1) -> list[Any]:
    made = [nn.BatchNorm1d(channels, momentum=momentum) for _ in range(count)]
    for i, norm in enumerate(made):
        assert norm.running_mean is not None
        assert norm.num_batches_tracked is not None
        norm.running_mean.uniform_(generator=torch.Generator().manual_seed(i))
        norm.num_batches_tracked.fill_(i)
    return made


def batches(sizes: list[int], channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, channels, generator=generator) * 2 + 1 for size in sizes]


def moments(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.stack([p.mean(0) for p in parts]), torch.stack([p.var(0, correction=0) for p in parts])


def tensors(of: list[Any]) -> list[list[Any]]:
    return [[getattr(n, name) for n in of] for name in ("running_mean", "running_var", "num_batches_tracked")]


def arguments(counted: bool = False, momentum: float | None = 0.1) -> tuple[Any, ...]:
    counts = ([], torch.tensor([2, 3])) if counted else ([2, 3], None)
    return (*tensors(norms(2, 3)), *moments(batches([2, 3], 3)), *counts, momentum)


# The position of an argument, and a change that is refused before anything is written.
WRONG: dict[str, tuple[int, Callable[[Any], Any]]] = {
    r"running_mean: expected shape \(3\), got \(2\)": (0, lambda means: [means[0], means[1][:2]]),
    "running_mean: expected memory for each channel": (0, lambda means: [means[0], means[1][:1].expand(3)]),
    "running_var: expected float32": (1, lambda variances: [variances[0], variances[1].long()]),
    "running_var, batches, counts: expected 2 of them, got 1": (1, lambda variances: variances[:1]),
    "running_var, batches, counts: expected 2 of them, got 2, 1": (2, lambda numbers: numbers[:1]),
    "batches: expected int64 of 1": (2, lambda numbers: [numbers[0], numbers[1].int()]),
    "mean: expected float32 or float64": (3, lambda mean: mean.half()),
    "var: expected the dtype of mean": (4, lambda var: var.double()),
    "mean, var: expected 6 elements, got 3, 6": (3, lambda mean: mean[:1]),
    "running_var, batches, counts: expected 2 of them, got 2, 2, 1": (5, lambda counts: counts[:1]),
    "counted: expected int64 of 2": (6, lambda _: torch.ones(3, dtype=torch.int64)),
}


class TestRunningStatistics:
    device = "cpu"

    def place(self, values: Any) -> Any:
        return on_device(values, self.device)

    @by_dtype
    @BY_MOMENTUM
    @BY_COUNTS
    def test_equals_torch(self, momentum: float | None, dtype: torch.dtype, counted: bool) -> None:
        """More norms than a launch takes, more channels than a block has threads; any dtype and stride."""
        sizes = [2 + i % 3 for i in range(18)]
        theirs = [norm.double() for norm in norms(18, 300, momentum)]
        ours = self.place([[t.to(dtype) if t.is_floating_point() else t for t in ts] for ts in tensors(theirs)])
        ours = copy.deepcopy(ours)
        ours[1][::2] = [torch.stack([t, t], 1)[:, 0] for t in ours[1][::2]]
        for seed in range(2):
            parts = [part + seed for part in batches(sizes, 300)]
            new, versions = self.place(moments(parts)), [t._version for ts in ours for t in ts]
            counts: Any = self.place(torch.tensor(sizes)) if counted else sizes
            move_running_statistics(Running(*ours, momentum), *new, counts)
            assert [t._version for ts in ours for t in ts] == [version + 1 for version in versions]
            for norm, part in zip(theirs, parts, strict=True):
                norm(part.double())
        tolerance = {torch.bfloat16: 0.02, torch.float16: 2e-3}.get(dtype, 1e-6)
        for found, want in zip(ours, tensors(theirs), strict=True):
            want = [t.to(one.dtype) for t, one in zip(want, found, strict=True)]
            torch.testing.assert_close([t.cpu() for t in found], want, rtol=tolerance, atol=tolerance)

    @BY_COUNTS
    def test_few_values_only_count_the_batch(self, counted: bool) -> None:
        found = self.place(tensors(norms(3, 4)))
        before = copy.deepcopy(found)
        counts: Any = self.place(torch.tensor([0, 1, 2])) if counted else [0, 1, 2]
        move_running_statistics(Running(*found, None), *torch.full((2, 3, 4), 9.0, device=self.device), counts)
        for running, old in zip(found[:2], before[:2], strict=True):
            assert [torch.equal(t, o) for t, o in zip(running, old, strict=True)] == [True, True, False]
        assert [int(t) for t in found[2]] == [1, 2, 3]

    @pytest.mark.parametrize(("momentum", "moved"), [(0.5, 0.5), (None, 0.0)])
    def test_without_numbers_of_batches(self, momentum: float | None, moved: float) -> None:
        """As in torch, an average does not move where nobody counts the batches."""
        mean, var = torch.zeros(2, 4, device=self.device)
        move_running_statistics(Running([mean], [var], [], momentum), *torch.ones(2, 4, device=self.device), [10])
        assert mean.tolist() == [moved] * 4

    @BY_MOMENTUM
    @BY_COUNTS
    def test_reference_equals_kernel(self, counted: bool, momentum: float | None) -> None:
        found, want = (self.place(arguments(counted, momentum)) for _ in range(2))
        OP(*found)
        running_statistics.reference(*want)
        torch.testing.assert_close(found, want)

    @BY_MOMENTUM
    @BY_COUNTS
    def test_opcheck(self, counted: bool, momentum: float | None) -> None:
        torch.library.opcheck(OP, self.place(arguments(counted, momentum)))

    @pytest.mark.tracing
    @BY_MOMENTUM
    def test_compile(self, momentum: float | None) -> None:
        found, want = (self.place(tensors(norms(2, 3))) for _ in range(2))
        new = self.place(moments(batches([4, 5], 3)))
        torch._dynamo.reset()

        def move(running: list[list[Tensor]], mean: Tensor, var: Tensor) -> Tensor:
            move_running_statistics(Running(*running, momentum), mean, var, [4, 5])
            return running[0][1] + 1

        for _ in range(2):
            result = torch.compile(move, backend="aot_eager", fullgraph=True)(found, *new)
            assert torch.equal(result, move(want, *new))
        torch.testing.assert_close(found, want)

    def test_vmap(self) -> None:
        """Each element moves its own statistics; the same for all would be moved by every one."""
        parts = self.place([torch.stack([p, p + 1, 2 * p]) for p in batches([4, 5], 3)])
        want = [self.place(tensors(norms(2, 3))) for _ in range(3)]
        running = [[torch.stack([t] * 3, -1) for t in values] for values in want[0]]

        def move(running: Any, parts: Any) -> Tensor:
            move_running_statistics(Running(*running, 0.1), *moments(parts), [4, 5])
            return parts[0].sum()

        torch.func.vmap(move, in_dims=(-1, 0))(running, parts)
        for i, values in enumerate(want):
            move(values, [p[i] for p in parts])
            torch.testing.assert_close([[t[..., i] for t in ts] for ts in running], values)
        with pytest.raises(RuntimeError, match=r"running_mean.*got the same for all"):
            torch.func.vmap(move, in_dims=(None, 0))(want[0], parts)

    def test_lazily_negated_tensors(self) -> None:
        found, want = (self.place(arguments()) for _ in range(2))
        negated = [[torch._neg_view(-t) for t in values] for values in found[:2]]
        OP(*negated, found[2], torch._neg_view(-found[3]), *found[4:])
        OP(*want)
        torch.testing.assert_close(negated, list(want[:2]))

    @pytest.mark.parametrize("message", WRONG)
    def test_wrong_arguments(self, message: str) -> None:
        given: list[Any] = [*arguments()]
        position, change = WRONG[message]
        given[position] = change(given[position])
        given[5] = [] if position == 6 else given[5]
        given = self.place(given)
        before = copy.deepcopy(given)
        with pytest.raises(RuntimeError, match=message):
            OP(*given)
        torch.testing.assert_close(given, before)

    def test_raw_op_with_bad_arguments(self) -> None:
        assert raw_ops.has_kernel("move_running_statistics_", self.device)
        for counted in (False, True):
            given = self.place(arguments(counted))
            for what, wrong in raw_ops.wrong_arguments(given, self.device):
                # Only the number of elements matters of all but the statistics, which come first.
                if "dimension" not in what or int(what[-1]) < 4:
                    assert raw_ops.attempt(OP, wrong, self.device) is not None, what
            for odd in raw_ops.odd_arguments(given):
                raw_ops.attempt(OP, odd, self.device)
