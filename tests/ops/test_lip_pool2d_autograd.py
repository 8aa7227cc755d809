"""lip_pool2d within torch's autograd: writes in place, higher derivatives, transforms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from paper_layers import lip_pool2d
from paper_layers.ops.lip_pool2d import _backward_reference
from testing.cases import Case
from tests.ops.test_lip_pool2d import images

WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda y: F.relu(y, inplace=True),
    "dropout": lambda y: F.dropout(y, 0.5, True, inplace=True),
    "skip": lambda y: y.add_(torch.linspace(-1, 1, y.numel()).reshape(y.shape)),
    "twice": lambda y: y.mul_(y.detach().cos()).sin_(),
    "part": lambda y: y.index_fill_(-1, torch.tensor([0]), 2.0),
}
Step = Callable[[Tensor, Tensor], Tensor]


def first(step: Step, input: Tensor, logit: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(step(input, logit).square().sum(), (input, logit))


def second(step: Step, input: Tensor, logit: Tensor) -> tuple[Tensor, ...]:
    grads = torch.autograd.grad(step(input, logit).square().sum(), (input, logit), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), (input, logit))


def backward_of(step: Step, *leaves: Tensor) -> tuple[Any, ...]:
    step(*leaves).square().sum().backward()
    return tuple(t.grad for t in leaves)


def hooked(step: Step, *leaves: Tensor) -> tuple[Tensor, ...]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        output = step(*leaves)
    return torch.autograd.grad(output.square().sum(), leaves)


def on_cpu(step: Step, *leaves: Tensor) -> tuple[Tensor, ...]:
    with torch.autograd.graph.save_on_cpu():
        output = step(*leaves)
    return torch.autograd.grad(output.square().sum(), leaves)


def functional(step: Step, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.func.grad(lambda *t: step(*t).square().sum(), argnums=(0, 1))(*(t.detach() for t in leaves))


def compiled(step: Step, *leaves: Tensor) -> tuple[Tensor, ...]:
    torch._dynamo.reset()
    return first(torch.compile(step, backend="aot_eager", fullgraph=True), *leaves)


WAYS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "backward": first,
    "double backward": second,
    "checkpoint": lambda step, *leaves: first(lambda *t: checkpoint(step, *t, use_reentrant=False), *leaves),
    "reentrant": lambda step, *leaves: backward_of(lambda *t: checkpoint(step, *t, use_reentrant=True), *leaves),
    "hooks": hooked,
    "save_on_cpu": on_cpu,
    "func.grad": functional,
    "compile": compiled,
}


@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (17, 9, 7)], ids=["batch", "image"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.tracing if way == "compile" else ()) for way in WAYS]
)
def test_layers_that_follow_may_write_over_the_output(way: str, write: str, shape: tuple[int, ...]) -> None:
    """As over the output of torch's pools: gradients are those of a layer that writes elsewhere."""
    if way == "compile" and (write != "relu" or len(shape) == 3):
        pytest.skip("one write and one shape are compiled, since compiling takes seconds")
    case = Case((images(*shape), images(*shape).flip(-1)))

    def result(copy: bool) -> tuple[Tensor, ...]:
        def step(input: Tensor, logit: Tensor) -> Tensor:
            output = lip_pool2d(input, logit, 3, 2, 1)
            return WRITES[write](output + 0 if copy else output)

        torch.manual_seed(0)
        return (first if copy and way != "double backward" else WAYS[way])(step, *case.leaves())

    torch.testing.assert_close(result(copy=False), result(copy=True))


def test_vmapped_gradients_with_a_write_in_place() -> None:
    def gradient(copy: bool, input: Tensor) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            output = lip_pool2d(x, 2 * x, 3, 2, 1)
            return F.relu(output + 0 if copy else output, inplace=True).square().sum()

        return torch.func.grad(loss)(input)

    input = images(4, 2, 3, 8, 7)
    got, want = (torch.func.vmap(lambda x, c=copy: gradient(c, x))(input) for copy in (False, True))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("written", [0, 1])
def test_writing_over_an_input_is_an_error(written: int) -> None:
    leaves = Case((images(2, 3, 7, 9), images(2, 3, 9, 7).mT)).leaves()
    tensors = [t * 1 for t in leaves]
    output = lip_pool2d(*tensors, 3, 2, 1)
    tensors[written].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_second_derivatives_of_inputs_with_an_offset() -> None:
    """About the windows' averages: an offset of the input, which they do not depend on, costs no digits."""
    logit, weight = images(3, 2, 4, 9), images(3, 2, 1, 6)

    def second(input: Tensor, logit: Tensor) -> tuple[Tensor, ...]:
        output = lip_pool2d(input, logit, 4, 1)
        leaves = (input, logit)
        grads = torch.autograd.grad((output * weight.to(output.dtype)).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for offset, steepness in itertools.product((0.0, 600.0), (0.0, 1.0)):
        case = Case((images(3, 2, 9, 4).mT + offset, steepness * logit))
        for got, want in zip(second(*case.leaves()), second(*case.to(torch.float64).leaves()), strict=True):
            # An input of 600 is itself known to 3e-5 only.
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5 if offset == 0 else 2e-4)


def test_third_derivative() -> None:
    def second(input: Tensor, logit: Tensor) -> tuple[Tensor, ...]:
        leaves = (input, logit)
        grads = torch.autograd.grad(lip_pool2d(*leaves, 2, 1).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, create_graph=True)

    leaves = Case((images(1, 2, 3, 4), images(1, 1, 4, 3).mT)).to(torch.float64).leaves()
    assert torch.autograd.gradcheck(second, leaves)


def test_vmap_over_nothing() -> None:
    case = Case((torch.zeros(0, 2, 3, 8, 7), torch.zeros(2, 1, 8, 7)))
    output = torch.func.vmap(lambda x: lip_pool2d(x, case.tensors[1], 3, 2, 1))(case.tensors[0])
    assert output.shape == (0, 2, 3, 4, 4)
    gradients = torch.func.grad(lambda x, y: lip_pool2d(x, y, 3, 2, 1).sum(), argnums=(0, 1))
    grads = torch.func.vmap(gradients, in_dims=(0, None))(*case.tensors)
    assert [g.shape for g in grads] == [(0, 2, 3, 8, 7), (0, 2, 1, 8, 7)]
    assert torch.func.vmap(lambda x: lip_pool2d(x, x, 2), in_dims=2)(torch.zeros(3, 8, 0, 7)).shape == (0, 3, 4, 3)


@pytest.mark.tracing
def test_one_tensor_as_input_and_logit_compiles() -> None:
    def step(x: Tensor) -> Tensor:
        return lip_pool2d(x, logit=x, kernel_size=3, stride=2, padding=1)

    for shape in ((2, 3, 8, 9), (3, 8, 9)):
        torch._dynamo.reset()
        actual, expected = (images(*shape).requires_grad_() for _ in range(2))
        torch.compile(step, backend="aot_eager", fullgraph=True)(actual).square().sum().backward()
        step(expected).square().sum().backward()
        torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [3, 31])
def test_half_gradients_of_images_far_from_zero(dtype: torch.dtype, layout: torch.memory_format, kernel: int) -> None:
    """The gradients of a window's logits cancel: they are about averages that no half type has rounded."""
    input = (8 + images(2, 16, 36, 36) / 4).to(dtype).contiguous(memory_format=layout)
    geometry = ([kernel, kernel], [1, 1], [0, 0], False)
    for logit in (images(2, 1, 36, 36).to(dtype), images(2, 16, 36, 36).flip(0).to(dtype)):
        exact, tensors = ([t.to(d).requires_grad_() for t in (input, logit)] for d in (torch.float64, dtype))
        grads = [torch.autograd.grad(lip_pool2d(*t, kernel, 1).double().sum(), t) for t in (exact, tensors)]
        output = lip_pool2d(*tensors, kernel, 1).detach()
        grads.append(_backward_reference(torch.ones_like(output), input, logit, output, *geometry))
        for want, *others in zip(*grads, strict=True):
            for got in others:
                assert (got.double() - want).abs().max() < 5e-3 * want.abs().max()
