"""The battery that every op passes: one subclass of `Battery` an op, in a file of the op's name."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import paper_layers
from testing import raw_ops
from testing.cases import Case, assert_close, by_dtype, drawn, on_device

# Changes of an output, in place and out of place.
WRITES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "mul_": (lambda t: t.mul_(2), lambda t: t * 2),
    "relu_": (lambda t: t.relu_(), lambda t: t.relu()),
}


class Battery:
    """Tests of every op, with gradients or without. Subclasses set these three and write `fixed_cases`, small."""

    device = "cpu"
    function: Callable[..., Tensor]
    ops: dict[str, Any]  # the op and its backward, by name
    bad_inputs: dict[str, tuple[Callable[[], Any], type[Exception], str]]
    any_of_equals = False  # whether an exported op may choose others among equals
    taken: frozenset[tuple[str, str]] = frozenset()  # what a raw op takes of what `raw_ops.wrong_arguments` names

    @staticmethod
    def fixed_cases() -> list[Case]:
        raise NotImplementedError

    def placed_cases(self) -> list[Case]:
        """The fixed cases on the device that is tested."""
        return [case.on(self.device) for case in self.fixed_cases()]

    @staticmethod
    def op_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
        """The arguments of each of `ops`."""
        raise NotImplementedError

    def raw_calls(self) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        """Each op that has a kernel on the device that is tested, with arguments on the CPU."""
        for case in self.fixed_cases():
            for name, arguments in self.op_arguments(case).items():
                if raw_ops.has_kernel(name, self.device):
                    yield name, self.ops[name], arguments

    def test_kernels_are_loaded(self) -> None:
        for name in self.ops:
            assert raw_ops.has_kernel(name, self.device), paper_layers.show_config()

    def test_opcheck(self) -> None:
        for case in self.fixed_cases():
            for name, arguments in self.op_arguments(case).items():
                torch.library.opcheck(self.ops[name], on_device(arguments, self.device))

    @pytest.mark.tracing
    def test_export(self) -> None:
        function, case = self.function, self.placed_cases()[0]

        class Module(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> Tensor:
                return function(*tensors, **case.options)

        program = torch.export.export(Module(), case.tensors)
        torch.testing.assert_close(program.module()(*case.tensors), function(*case.tensors, **case.options))

    def test_meta(self) -> None:
        for case in self.placed_cases():
            options = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in case.options.items()}
            on_meta = self.function(*(t.to("meta") for t in case.tensors), **options)
            real = self.function(*case.tensors, **case.options)
            assert (on_meta.shape, on_meta.dtype, on_meta.stride()) == (real.shape, real.dtype, real.stride())

    def maps(self, case: Case) -> list[Callable[..., Any]]:
        """Functions for `test_vmap_over_nothing`. In them torch has no arithmetic of one number for each element."""
        return [lambda *tensors: self.function(*tensors, **case.options)]

    def test_vmap_over_nothing(self) -> None:
        for case, dim in itertools.product(self.placed_cases(), (0, -1)):
            two = tuple(torch.stack([t, t], dim) for t in case.tensors)
            for function in self.maps(case):
                mapped = torch.func.vmap(function, dim)
                none, some = (pytree.tree_leaves(mapped(*(t.narrow(dim, 0, n) for t in two))) for n in (0, 2))
                assert [t.shape for t in none] == [(0, *t.shape[1:]) for t in some]

    def test_decompositions(self) -> None:
        """They return what the kernels do, in memory too: under symbolic sizes torch takes them for the fakes."""
        for case in self.fixed_cases():
            for name, arguments in self.op_arguments(case).items():
                decomposition = torch._decomp.decomposition_table.get(self.ops[name])
                if decomposition is None:
                    continue
                for layout in (torch.contiguous_format, torch.channels_last):
                    actual, expected = (
                        f(*raw_ops.in_layout(on_device(arguments, self.device), layout))
                        for f in (decomposition, self.ops[name])
                    )
                    if self.any_of_equals:
                        actual, expected = torch.zeros_like(actual), torch.zeros_like(expected)
                    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, check_stride=True)

    @pytest.mark.cpu_only
    def test_bad_inputs(self, subtests: Any) -> None:
        for name, (call, error, message) in self.bad_inputs.items():
            with subtests.test(name), pytest.raises(error, match=message):
                call()

    def test_raw_op_with_bad_arguments(self, subtests: Any) -> None:
        for name, op, arguments in self.raw_calls():
            for what, wrong in raw_ops.wrong_arguments(on_device(arguments, self.device), self.device):
                if (name, what) not in self.taken:
                    with subtests.test(f"{name}: {what}"):
                        assert raw_ops.attempt(op, wrong, self.device) is not None

    def test_raw_op_with_odd_arguments(self) -> None:
        """Sizes and numbers that do not fit. Where they happen to, a result is as well."""
        for _, op, arguments in self.raw_calls():
            for odd in raw_ops.odd_arguments(arguments):
                raw_ops.attempt(op, odd, "cpu")
                raw_ops.attempt_on_gpu(op, odd, self.device)

    def test_sizes_without_elements(self) -> None:
        for name, op, arguments in self.raw_calls():
            sizes = list(raw_ops.sizes_without_elements(arguments))

            def calls(op: Any = op, sizes: list[Any] = sizes) -> None:
                for some in sizes:
                    raw_ops.attempt(op, some, "cpu")

            survived = raw_ops.survives(calls)
            for some in sizes:
                shapes = [a.shape if isinstance(a, Tensor) else a for a in some]
                call = partial(raw_ops.attempt, op, some, "cpu")
                assert survived or raw_ops.survives(call, 10), (name, shapes)
                raw_ops.attempt_on_gpu(op, some, self.device)

    def test_lesser_instruction_set(self) -> None:
        """The baseline kernels, in a process of their own: the set is chosen when the library is loaded."""
        if os.environ.get("PAPER_LAYERS_CPU_CAPABILITY"):
            return
        file = sys.modules[type(self).__module__].__file__
        environment = {**os.environ, "PAPER_LAYERS_CPU_CAPABILITY": "default", "PAPER_LAYERS_EXAMPLES": "20"}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file), "-k", "equals_formula"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


class OpBattery(Battery):
    """Tests of an op with gradients. Subclasses also set these and a strategy, `cases`; `fixed_cases` are smooth."""

    formula: Callable[..., Tensor]  # differentiable to any order, the oracle in float64
    grad_scale = 4.0  # absolute tolerance of gradients, in those of values

    @staticmethod
    def cases() -> st.SearchStrategy[Case]:
        raise NotImplementedError

    @staticmethod
    def output_dtype(dtype: torch.dtype) -> torch.dtype:
        """The dtype of what the function returns for tensors of a dtype."""
        return dtype

    @by_dtype
    def test_equals_formula(self, dtype: torch.dtype) -> None:
        @drawn
        @given(case=self.cases())
        def check(case: Case) -> None:
            case = case.to(dtype)
            placed, exact = case.on(self.device), case.to(torch.float64).leaves()
            tensors = placed.leaves()
            actual, expected = self.function(*tensors, **placed.options), self.formula(*exact, **case.options)
            assert actual.dtype == self.output_dtype(dtype)
            assert actual.device.type == self.device
            assert_close(actual.cpu(), expected, dtype)
            grad = torch.linspace(-1, 1, expected.numel(), dtype=actual.dtype).reshape(expected.shape)
            grads = torch.autograd.grad(actual, tensors, grad.to(self.device))
            for got, want, tensor in zip(
                grads, torch.autograd.grad(expected, exact, grad.double()), tensors, strict=True
            ):
                assert got.dtype == dtype
                assert got.shape == tensor.shape
                # Gradients of a shared tensor are sums over what shares it.
                assert_close(
                    got.cpu(),
                    want,
                    dtype,
                    scale=self.grad_scale * max(1.0, (case.tensors[0].numel() / max(1, got.numel()))),
                )

        check()

    def test_gradcheck(self) -> None:
        for case in self.placed_cases():
            leaves = case.to(torch.float64).leaves()
            assert torch.autograd.gradcheck(lambda *t, o=case.options: self.function(*t, **o), leaves)
            assert torch.autograd.gradgradcheck(
                lambda *t, o=case.options: self.function(*t, **o), leaves, fast_mode=True
            )

    def test_func_grad_and_vmap(self) -> None:
        def check(case: Case) -> None:
            placed = case.on(self.device)

            def loss(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
                options = case.options if function is self.formula else placed.options
                return function(*tensors, **options).square().sum()

            stacked = tuple(torch.stack([t, t.flip(-1), 2 * t]) for t in case.tensors)
            every = tuple(range(len(stacked)))
            gradients = torch.func.grad(lambda *tensors: loss(self.function, tensors), argnums=every)
            expected = []
            for tensors in zip(*stacked, strict=True):
                leaves = Case(tensors).leaves()
                expected.append(torch.autograd.grad(loss(self.formula, leaves), leaves))
            want = tuple(torch.stack(parts) for parts in zip(*expected, strict=True))
            got = torch.func.vmap(gradients)(*on_device(stacked, self.device))
            torch.testing.assert_close(got, on_device(want, self.device))
            # Only the first tensor batched, in its last dimension.
            moved = on_device(stacked[0].movedim(0, -1), self.device)
            one = torch.func.vmap(lambda t: self.function(t, *placed.tensors[1:], **placed.options), in_dims=-1)(moved)
            torch.testing.assert_close(one[1].cpu(), self.formula(stacked[0][1], *case.tensors[1:], **case.options))

        for case in self.fixed_cases():
            check(case.to(torch.float64))

    def maps(self, case: Case) -> list[Callable[..., Any]]:
        (function,) = super().maps(case)
        gradients = torch.func.grad(lambda *t: function(*t).square().sum(), tuple(range(len(case.tensors))))
        return [function, gradients]

    def test_jvp_is_refused(self) -> None:
        case = self.placed_cases()[0]
        with pytest.raises(NotImplementedError):
            torch.func.jvp(lambda *t: self.function(*t, **case.options), case.tensors, case.tensors)

    def outputs(self, *tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """All that a user may write to."""
        return (self.function(*tensors, **options),)

    @pytest.mark.parametrize("write", list(WRITES))
    def test_writes_on_outputs(self, write: str) -> None:
        in_place, out_of_place = WRITES[write]

        def loss(change: Callable[[Tensor], Tensor], case: Case, leaves: tuple[Tensor, ...]) -> Tensor:
            outputs = self.outputs(*(t * 1 for t in leaves), **case.options)
            return torch.stack([change(output).square().sum() for output in outputs]).sum()

        def gradients(value: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor | None]:
            value.backward()
            return [leaf.grad for leaf in leaves]

        for fixed in self.placed_cases():
            case = fixed.to(torch.float64)
            leaves = case.leaves()
            want = gradients(loss(out_of_place, case, leaves), leaves)
            leaves = case.leaves()
            torch.testing.assert_close(gradients(loss(in_place, case, leaves), leaves), want)
            for reentrant in (False, True):
                leaves = case.leaves()
                value = checkpoint(lambda *t, c=case: loss(in_place, c, t), *leaves, use_reentrant=reentrant)
                torch.testing.assert_close(gradients(value, leaves), want)
            leaves = case.leaves()
            with torch.autograd.graph.save_on_cpu():
                value = loss(in_place, case, leaves)
            torch.testing.assert_close(gradients(value, leaves), want)
            seconds = []
            for change in (in_place, out_of_place):
                leaves = case.leaves()
                first = torch.autograd.grad(loss(change, case, leaves), leaves, create_graph=True)
                seconds.append(gradients(torch.stack([g.square().sum() for g in first]).sum(), leaves))
            torch.testing.assert_close(*seconds)

    @pytest.mark.tracing
    def test_compiled_writes_on_outputs(self) -> None:
        for fixed in self.placed_cases()[:2]:
            case = fixed.to(torch.float64)

            def loss(*tensors: Tensor, in_place: bool, case: Case = case) -> Tensor:
                parts = []
                for output in self.outputs(*(t * 1 for t in tensors), **case.options):
                    changed = output.add_(tensors[0].sum()).mul_(2) if in_place else (output + tensors[0].sum()) * 2
                    parts.append(changed.square().sum())
                return torch.stack(parts).sum()

            torch._dynamo.reset()
            compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
            actual, expected = case.leaves(), case.leaves()
            compiled(*actual, in_place=True).backward()
            loss(*expected, in_place=False).backward()
            torch.testing.assert_close([t.grad for t in actual], [t.grad for t in expected])

    def test_writes_on_inputs(self) -> None:
        """They are torch's error, unless the backward does not need what was written to."""
        for fixed in self.placed_cases():
            case = fixed.to(torch.float64)
            leaves = case.leaves()
            want = torch.autograd.grad(self.function(*leaves, **case.options).square().sum(), leaves)
            for i in range(len(leaves)):
                leaves = case.leaves()
                tensors = [leaf * 1 for leaf in leaves]
                value = self.function(*tensors, **case.options).square().sum()
                with torch.no_grad():
                    tensors[i].mul_(3)
                try:
                    got = torch.autograd.grad(value, leaves)
                except RuntimeError as error:
                    if "modified by an inplace operation" not in str(error):
                        raise
                else:
                    torch.testing.assert_close(got, want)

    def test_one_tensor_as_two_arguments(self) -> None:
        """Every pair of arguments of one shape and dtype, compiled as a whole."""
        for fixed in (case.on(self.device) for case in self.alias_cases()):
            options = {n: v for n, v in fixed.options.items() if isinstance(v, Tensor)}
            named = {**dict(enumerate(fixed.tensors)), **options}
            for first, second in itertools.combinations(named, 2):
                one, other = named[first], named[second]
                if (one.shape, one.dtype) != (other.shape, other.dtype):
                    continue
                torch._dynamo.reset()
                results = []
                for compiled in (False, True):
                    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in named.items()}
                    leaves[second] = leaves[first]

                    def step(leaves: dict[Any, Tensor], case: Case = fixed) -> Tensor:
                        tensors = [leaves[i] for i in range(len(case.tensors))]
                        changed = {n: leaves.get(n, v) for n, v in case.options.items()}
                        return self.function(*tensors, **changed)

                    call = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
                    output = call(leaves)
                    output.square().sum().backward()
                    results.append([output.detach(), *(t.grad for t in leaves.values() if t.grad is not None)])
                torch.testing.assert_close(*results)

    def alias_cases(self) -> list[Case]:
        """Cases whose arguments have equal shapes where they can."""
        return self.fixed_cases()

    @pytest.mark.tracing
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compile(self, backend: str) -> None:
        cases = self.placed_cases() if backend == "aot_eager" else self.placed_cases()[:1]
        for case in cases:
            torch._dynamo.reset()

            def step(*tensors: Tensor, case: Case = case) -> Tensor:
                return self.function(*(t * 1.5 for t in tensors), **case.options).square()

            compiled = torch.compile(step, backend=backend, fullgraph=True)
            actual, expected = case.leaves(), case.leaves()
            got, want = compiled(*actual), step(*expected)
            torch.testing.assert_close(got, want)
            assert got.stride() == want.stride()
            got.sum().backward()
            want.sum().backward()
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a.grad, b.grad)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype: torch.dtype) -> None:
        """Half tensors beside float32 ones are promoted; gradients come back in each tensor's dtype."""
        case = self.fixed_cases()[0].to(torch.float32)
        placed = Case((case.tensors[0].to(dtype), *case.tensors[1:]), case.options).on(self.device)
        tensors = placed.leaves()
        with torch.autocast(self.device, dtype=dtype):
            actual = self.function(*tensors, **placed.options)
        assert actual.dtype == (dtype if len(tensors) == 1 else torch.float32)
        actual.float().sum().backward()
        assert [t.grad.dtype for t in tensors] == [t.dtype for t in tensors]
        assert_close(actual.cpu(), self.formula(*(t.cpu().double() for t in tensors), **case.options), dtype)
