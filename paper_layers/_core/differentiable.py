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
_makers: dict[str, Callable[[int], tuple[Any, Any, Any]]] = {}
_eager: dict[tuple[str, int], Any] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _make_functions(name: str, count: int) -> None:
    """Make the Functions for so many tensors, unless they exist. torch.compile cannot trace a class definition."""
    if not hasattr(_functions, f"{name}_{count}"):
        functions = _makers[name](count)
        setattr(_functions, f"{name}_{count}", functions[0])
        setattr(_functions, f"{name}_backward_{count}", functions[1])
        _eager[name, count] = functions[2]


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
        count = len(arguments) - 1
        if torch.compiler.is_compiling():
            _make_functions(name, count)
            return getattr(_functions, f"{name}_{count}").apply(*_distinct(arguments))
        if _torch_private.in_transform():
            _make_functions(name, count)
            return getattr(_functions, f"{name}_{count}").apply(*arguments)
        if not _needs_gradient(arguments):
            return forward(*arguments[:-1], *arguments[-1])
        if (name, count) not in _eager:
            _make_functions(name, count)
        return _eager[name, count].apply(*arguments)

    def make(count: int) -> tuple[Any, Any, Any]:
        inputs = tuple(range(count)) if saved is None else tuple(saved)

        class Forward(torch.autograd.Function):
            @staticmethod
            def forward(*arguments: Any) -> Any:
                return forward(*arguments[:-1], *arguments[-1])

            @staticmethod
            def setup_context(ctx: Any, arguments: tuple[Any, ...], output: Any) -> None:
                ctx.settings = arguments[-1]
                results = (output,) if isinstance(output, Tensor) else output
                if constant:
                    ctx.mark_non_differentiable(*[results[i] for i in constant])
                tensors = arguments[:-1] if saved is None else [arguments[i] for i in saved]
                _save(ctx, tensors, [results[i] for i in kept], [results[i] for i in exposed])

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
                def again(*tensors: Any) -> tuple[Tensor, ...]:
                    output = call(*tensors[:count], ctx.settings)
                    return tuple(((output,) if isinstance(output, Tensor) else output)[i] for i in exposed)

                if constant:
                    grads = tuple(grads[i] for i in smooth)
                    if grads[0] is None:  # Undefined: `Eager` makes no zeros.
                        return (None,) * (count + 1)
                tensors = grads + (ctx.saved_tensors if ctx.complete else _load(ctx, again))
                needs = ctx.needs_input_grad
                settings = (*ctx.settings, needs[:-1]) if selective else ctx.settings
                compiling = torch.compiler.is_compiling()
                if compiling or _torch_private.in_transform() or _needs_gradient(tensors):
                    function = getattr(_functions, f"{name}_backward_{count}")
                    results = function.apply(*_distinct(tensors) if compiling else tensors, settings)
                else:
                    results = backward(*tensors, *settings)
                results = (results,) if isinstance(results, Tensor) else results
                found = [grad if need else None for grad, need in zip(results, needs, strict=False)]
                return *found, *[None] * (count + 1 - len(found))

            @staticmethod
            def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
                return forward_rule(Forward.apply, info.batch_size, in_dims, arguments)

        class Eager(Forward):
            """Outside transforms: torch takes twice as long to call a Function with a `setup_context`."""

            setup_context: Any = staticmethod(torch.autograd.Function.setup_context)

            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                output = forward(*arguments[:-1], *arguments[-1])
                Forward.setup_context(ctx, arguments, output)
                if constant:  # No zeros for their gradients, which nobody reads.
                    ctx.set_materialize_grads(len(smooth) > 1)
                return output

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
        return Forward, Backward, Eager

    _makers[name] = make
    return call


def _needs_gradient(arguments: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


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


def _save(ctx: Any, tensors: Sequence[Any], kept: list[Tensor], exposed: list[Tensor]) -> None:
    """Save tensors for the backward, including outputs that later layers may write over.

    Torch refuses a backward that finds a saved output changed. Here the output is kept with its version, unless
    hooks wait for what is saved, as in checkpointing and off-loading: they would not see it.
    """
    ctx.complete = torch.compiler.is_compiling() or not exposed
    if torch.compiler.is_compiling():  # Copies, which the compiler drops where nobody writes.
        ctx.save_for_backward(*tensors, *[output.clone() for output in (*kept, *exposed)])
        return
    ctx.save_for_backward(*tensors, *kept)
    if exposed:
        hidden = exposed[0].is_inference() or _torch_private.is_transformed(exposed[0])
        ctx.exposed = None
        if not hidden and any(ctx.needs_input_grad) and not _torch_private.saving_is_hooked():
            ctx.exposed = [(output.detach(), output._version) for output in exposed]


def _load(ctx: Any, again: Callable[..., tuple[Tensor, ...]]) -> tuple[Any, ...]:
    """Return the saved tensors and the exposed outputs, computed again if they were written to or not kept."""
    tensors: tuple[Any, ...] = ctx.saved_tensors
    # Kept for one backward: the context may live on with the loss.
    exposed, ctx.exposed = ctx.exposed, None
    if exposed is not None:
        for output, version in exposed:
            if output._version != version:
                break
        else:
            return *tensors, *[output for output, _ in exposed]
    return *tensors, *again(*(None if t is None else t.detach() for t in tensors))
