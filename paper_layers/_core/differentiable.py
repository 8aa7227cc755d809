"""Make an op differentiable: to any order, under `torch.func`, `torch.compile` and writes over its outputs."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paper_layers._core import _torch_private
from paper_layers._core.autocast import without_autocast
from paper_layers._core.vmap import Rule

# The Functions of all ops, by name and number of tensors: torch.compile finds a class only where a module has it.
_functions = types.ModuleType("paper_layers autograd functions")
_makers: dict[str, Callable[[int], tuple[Any, Any]]] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _make_functions(name: str, count: int) -> None:
    """Make the Functions for so many tensors, unless they exist. torch.compile cannot trace a class definition."""
    if not hasattr(_functions, f"{name}_{count}"):
        functions = _makers[name](count)
        setattr(_functions, f"{name}_{count}", functions[0])
        setattr(_functions, f"{name}_backward_{count}", functions[1])


def differentiable(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    formula: Callable[..., Any] | None = None,
    second: Callable[..., tuple[Tensor, ...]] | None = None,
    vmap: Rule | tuple[Rule, Rule],
    outputs: int = 1,
    saved: Sequence[int] | None = None,
    kept: Sequence[int] = (),
    exposed: Sequence[int] = (),
    constant: Sequence[int] = (),
    selective: bool = False,
) -> Callable[..., Any]:
    """Return a function of tensors and a tuple of settings that calls `forward`, and has the gradient `backward`.

    Tensors with gradients come first, and tensors may be None. Where nothing needs a gradient, `forward` is called
    directly. Under forward-mode differentiation the function raises an error, as does every Function without `jvp`.

    Args:
        name: A name of its own for each op.
        forward: ``forward(*tensors, *settings)``, usually an op; returns a tensor or a tuple of tensors.
        backward: ``backward(*grads, *saved, *kept, *exposed, *settings)`` returns the gradients of the first tensors,
            where `grads` are those of the outputs that are not constant.
        formula: The same gradients, ``formula(*grads, *saved, *kept, *settings)``, in PyTorch and differentiable.
        second: In place of `formula`: ``second(along, *grads, *saved, *kept, *settings)`` returns the gradients of the
            sum of `backward`'s results times `along` with respect to its first arguments.
        vmap: The rule for forward and backward, or one for each.
        outputs: The number of the outputs.
        saved: Positions of the tensors that `backward` takes; default all.
        kept: Positions of the outputs that `backward` takes and that only the op itself can reach.
        exposed: Positions of the outputs that `backward` takes and that layers which follow may write over. They are
            computed again if they have been, so `saved` must be all tensors.
        constant: Positions of the outputs without gradient.
        selective: Give `backward` and `formula` a last argument: for each tensor, whether its gradient is needed. For
            others they return anything, such as an empty tensor.
    """
    forward_rule, backward_rule = vmap if isinstance(vmap, tuple) else (vmap, vmap)
    smooth = tuple(i for i in range(outputs) if i not in constant)

    def call(*arguments: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not compiling and _is_constant(arguments):
            return forward(*arguments[:-1], *arguments[-1])
        count = len(arguments) - 1
        _make_functions(name, count)
        function = getattr(_functions, f"{name}_{count}")
        return function.apply(*_distinct(arguments) if compiling else arguments)

    def make(count: int) -> tuple[Any, Any]:
        inputs = tuple(range(count)) if saved is None else tuple(saved)

        class Forward(torch.autograd.Function):
            @staticmethod
            def forward(*arguments: Any) -> Any:
                return forward(*arguments[:-1], *arguments[-1])

            @staticmethod
            def setup_context(ctx: Any, arguments: tuple[Any, ...], output: Any) -> None:
                ctx.settings = arguments[-1]
                results = output if isinstance(output, tuple) else (output,)
                if constant:
                    ctx.mark_non_differentiable(*[results[i] for i in constant])
                _save(ctx, [arguments[i] for i in inputs], [results[i] for i in kept], [results[i] for i in exposed])

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
                def again(*tensors: Any) -> tuple[Tensor, ...]:
                    output = call(*tensors[:count], ctx.settings)
                    return tuple((output if isinstance(output, tuple) else (output,))[i] for i in exposed)

                tensors = (*[grads[i] for i in smooth], *_load(ctx, again))
                needs = ctx.needs_input_grad
                settings = (*ctx.settings, needs[:-1]) if selective else ctx.settings
                compiling = torch.compiler.is_compiling()
                if not compiling and _is_constant(tensors):
                    results = backward(*tensors, *settings)
                else:
                    function = getattr(_functions, f"{name}_backward_{count}")
                    results = function.apply(*_distinct(tensors) if compiling else tensors, settings)
                results = (results,) if isinstance(results, Tensor) else results
                found = [grad if need else None for grad, need in zip(results, needs, strict=False)]
                return *found, *[None] * (count + 1 - len(found))

            @staticmethod
            def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
                return forward_rule(Forward.apply, info.batch_size, in_dims, arguments)

        class Backward(torch.autograd.Function):
            @staticmethod
            def forward(*arguments: Any) -> Any:
                results = backward(*arguments[:-1], *arguments[-1])
                return results if isinstance(results, Tensor) else tuple(results)

            @staticmethod
            def setup_context(ctx: Any, arguments: tuple[Any, ...], output: Any) -> None:
                *tensors, ctx.settings = arguments
                # Outputs are functions of the inputs, so the inputs' gradients include their share.
                ctx.save_for_backward(*tensors[: len(tensors) - len(exposed)])
                ctx.unused = len(exposed) + 1

            @staticmethod
            def backward(ctx: Any, *along: Any) -> tuple[Tensor | None, ...]:
                tensors = ctx.saved_tensors
                found: list[Tensor | None]
                if second is not None:
                    found = [*second(along, *tensors, *ctx.settings)]
                else:
                    found = _differentiate(formula, along, tensors, ctx.settings, ctx.needs_input_grad)
                return *found, *[None] * (len(tensors) - len(found)), *[None] * ctx.unused

            @staticmethod
            def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
                return backward_rule(Backward.apply, info.batch_size, in_dims, arguments)

        # Without a signature torch inspects `forward` at every call; Dynamo counts its parameters.
        _sign(Forward, count + 1)
        _sign(Backward, len(smooth) + len(inputs) + len(kept) + len(exposed) + 1)
        return Forward, Backward

    _makers[name] = make
    return call


def _is_constant(arguments: tuple[Any, ...]) -> bool:
    """Return whether nothing needs a gradient or a transform's rule, while not compiling."""
    if _torch_private.in_transform():
        return False
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return False
    return True


def _distinct(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace each repeated tensor by a view of itself: Dynamo refuses the same tensor twice."""
    result: list[Any] = []
    for i, argument in enumerate(arguments):
        repeated = isinstance(argument, Tensor) and any(argument is other for other in arguments[:i])
        result.append(argument.view_as(argument) if repeated else argument)
    return tuple(result)


def _sign(function: Any, count: int) -> None:
    parameters = [inspect.Parameter(f"_{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(count)]
    function.forward.__signature__ = inspect.Signature(parameters)


def _differentiate(
    formula: Any, along: tuple[Any, ...], tensors: tuple[Any, ...], settings: tuple[Any, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return the gradients of `formula`'s results times `along` with respect to the tensors that need one."""
    wanted = [i for i, (tensor, need) in enumerate(zip(tensors, needs, strict=False)) if need and tensor is not None]

    def of_wanted(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tensors)
        for i, value in zip(wanted, values, strict=True):
            arguments[i] = value
        return tuple(formula(*arguments, *settings))

    with without_autocast(along[0].device.type):
        grads = torch.func.vjp(of_wanted, *[tensors[i] for i in wanted])[1](along)
    found: list[Tensor | None] = [None] * len(tensors)
    for i, grad in zip(wanted, grads, strict=True):
        found[i] = grad
    return found


def _save(ctx: Any, inputs: list[Any], kept: list[Tensor], exposed: list[Tensor]) -> None:
    """Save tensors for the backward, including outputs that later layers may write over.

    Torch refuses a backward that finds a saved output changed. Here the output is kept with its version, unless
    hooks wait for what is saved, as in checkpointing and off-loading: they would not see it.
    """
    ctx.complete, ctx.exposed = torch.compiler.is_compiling(), None
    if ctx.complete:  # Copies, which the compiler drops where nobody writes.
        ctx.save_for_backward(*inputs, *[output.clone() for output in (*kept, *exposed)])
        return
    ctx.save_for_backward(*inputs, *kept)
    ctx.complete = not exposed
    if (
        exposed
        and any(ctx.needs_input_grad)
        and not exposed[0].is_inference()
        and not _torch_private.saving_is_hooked()
        and not _torch_private.is_transformed(exposed[0])
    ):
        ctx.exposed = [(output.detach(), output._version) for output in exposed]


def _load(ctx: Any, again: Callable[..., tuple[Tensor, ...]]) -> tuple[Any, ...]:
    """Return the saved tensors; compute exposed outputs again if they were written to or not kept."""
    tensors: tuple[Any, ...] = ctx.saved_tensors
    if ctx.complete:
        return tensors
    # Kept for one backward: the context may live on with the loss.
    exposed, ctx.exposed = ctx.exposed, None
    if exposed is None or any(output._version != version for output, version in exposed):
        return *tensors, *again(*(None if t is None else t.detach() for t in tensors))
    return *tensors, *(output for output, _ in exposed)
