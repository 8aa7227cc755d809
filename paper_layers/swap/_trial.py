"""A run of a copy of a model on the meta device, which tells shapes."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from paper_layers.swap._lip_conv import LIPConv2d

_GUESSED_SIZE = 224
_HOOKS = [key for key, value in vars(nn.Module()).items() if key.endswith("_hooks") and isinstance(value, dict)]
_ALL_HOOKS = [key for key in vars(nn.Module()) if "_hooks" in key]  # And what is noted of some of them.

M = TypeVar("M", bound=nn.Module)


def trial_run(
    model: nn.Module,
    modules: Iterable[M],
    example_input: Any,
    watch: Callable[[M, M], Any],
    enough: Callable[[], bool] = lambda: False,
) -> tuple[Any, Exception | None]:
    """Run a copy of the model on the meta device: no data, no random numbers, no hooks but those that are set here.

    A run that breaks off is tried again with the model's own hooks, which some hosts live by, and then in evaluation
    mode, as detectors want targets in training.

    Args:
        model: Any module, which is left as it is.
        modules: Some of its modules.
        example_input: A tensor or a tuple of arguments; None for two images with the channels of the first `nn.Conv2d`.
        watch: ``watch(module, copy)`` is called for each of the modules, to set a hook on the copy.
        enough: Whether a run that broke off has gone far enough.

    Returns:
        The output, or None and the error that broke the run off. Any host may raise anything.
    """
    inputs = list(_guess_inputs(model)) if example_input is None else [example_input]
    reported: Exception | None = None  # The first guess's error, in the model's own mode.
    hooked = any(vars(module)[key] for module in model.modules() for key in _HOOKS)
    for example in inputs:
        args = example if isinstance(example, tuple) else (example,)
        args = tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), args)
        for training in (True, False) if model.training else (False,):
            # In evaluation no host needs targets, whose values the meta device does not have.
            fewer = [args] if training == model.training or len(args) == 1 else [args, args[:1]]
            for some, hooks in ((some, hooks) for some in fewer for hooks in ((False, True) if hooked else (False,))):
                output, failure = _try(model, modules, some, watch, hooks, training)
                if failure is None or enough():
                    return output, failure
                if example is inputs[0] and training == model.training:
                    reported = failure
    return None, reported


def _try(
    model: nn.Module,
    modules: Iterable[M],
    args: tuple[Any, ...],
    watch: Callable[[M, M], Any],
    hooks: bool,
    training: bool,
) -> tuple[Any, Exception | None]:
    try:
        with torch.no_grad(), torch.device("meta"), torch.random.fork_rng([]), torch.compiler.set_stance("force_eager"):
            twin, twins = _meta_copy(model, modules, hooks)
            if not training:
                twin.eval()
            for module, copied in twins.items():
                watch(module, copied)
            return twin(*args), None
    except Exception as error:
        return None, error


def _meta_copy(model: nn.Module, modules: Iterable[M], hooks: bool) -> tuple[nn.Module, dict[M, M]]:
    """The model without data, with its hooks or without, and what has become of some of its modules."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in chain(vars(module).values(), module._parameters.values(), module._buffers.values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().to("meta")
        if not hooks:
            memo.update((id(vars(module)[key]), type(vars(module)[key])()) for key in _ALL_HOOKS)
    twin = copy.deepcopy(model, memo)
    for module in twin.modules() if hooks else ():
        for key in _HOOKS:
            found = vars(module)[key]
            found.update({number: _rebound(hook, memo) for number, hook in found.items()})
    return twin, {module: memo[id(module)] for module in modules}


def _rebound(hook: Any, memo: dict[int, Any]) -> Any:
    """A hook that sees the copied model where it saw the model: functions are not copied with what they refer to."""
    if not isinstance(hook, types.FunctionType) or not hook.__closure__:
        return hook
    cells = []
    for cell in hook.__closure__:
        try:
            cells.append(types.CellType(copy.deepcopy(cell.cell_contents, memo)))
        except Exception:  # An empty cell, or what cannot be copied.
            cells.append(cell)
    bound = types.FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, tuple(cells))
    bound.__kwdefaults__ = hook.__kwdefaults__
    return bound


def _guess_inputs(model: nn.Module) -> Iterator[Tensor]:
    """The input size that timm states for its model, and two images with the channels of the first convolution."""
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    known = getattr(model, "pretrained_cfg", None)
    if isinstance(known, Mapping) and known.get("input_size"):
        yield torch.empty((2, *known["input_size"]), dtype=dtypes[0] if dtypes else None, device="meta")
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Conv2d | LIPConv2d):
            size: Any = (2, module.in_channels, _GUESSED_SIZE, _GUESSED_SIZE)
            yield torch.empty(size, dtype=module.weight.dtype, device="meta")
            return
    if not known:
        raise ValueError(
            "example_input: expected an input for a model that has no nn.Conv2d to guess one from, got None"
        )
