"""What every surgery does: choose modules and change them where they stand."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_GUESSED_SIZE = 224

Filter = Callable[[nn.Module, str], bool]
M = TypeVar("M", bound=nn.Module)


def select(
    model: nn.Module,
    wanted: str,
    fits: Callable[[Any], bool],
    done: Callable[[Any], bool],
    filter: Filter | None,
) -> dict[Any, str]:
    """The modules that fit and that `filter` accepts, each with the name that it was accepted under.

    Empty if there is none, but one that is `done`, by an earlier swap.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Module, got {type(model).__name__}")
    everything = list(model.named_modules(remove_duplicate=False))
    found = [(name, m) for name, m in everything if fits(m)]
    chosen = {m: name for name, m in reversed(found) if filter is None or filter(m, name)}
    if not chosen and not any(done(m) for _, m in everything):
        rejected = f" that filter accepts ({len(found)} without it)" if found else ""
        raise ValueError(f"model: expected at least one {wanted} to swap{rejected}, got none in {type(model).__name__}")
    for module, name in chosen.items():
        if "forward" in vars(module):
            raise ValueError(f"{called(name)}: expected the forward of its class, got one set on the object")
    return dict(reversed(chosen.items()))


def exactly(*kinds: type[nn.Module]) -> Callable[[Any], bool]:
    """Whether a module is of one of these classes. Subclasses compute something else and are left alone."""
    return lambda module: type(module) in kinds


def called(name: str) -> str:
    return f"model.{name}" if name else "model"


def become(old: nn.Module, new: nn.Module) -> None:
    """Turn `old` into `new` where it stands. It keeps its hooks (the very dictionaries) and training mode."""
    new.train(old.training)
    kept = {key: value for key, value in vars(old).items() if "_hook" in key}
    old.__class__ = type(new)
    old.__dict__ = {**vars(new), **kept}


def placement(model: nn.Module, name: str) -> dict[str, Any]:
    """Device and dtype of the module's parameters, or of the nearest ones around it."""
    module = model.get_submodule(name)
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            return {"device": tensor.device, "dtype": tensor.dtype}
    return placement(model, name.rpartition(".")[0]) if name else {}


def trial_run(
    model: nn.Module, modules: Iterable[M], example_input: Any, watch: Callable[[M, M], Any]
) -> tuple[Any, Exception | None]:
    """Run a copy of the model on the meta device: no data, no random numbers, no hooks but those that are set here.

    Args:
        model: Any module, which is left as it is.
        modules: Some of its modules.
        example_input: A tensor or a tuple of arguments; None for two images with the channels of the first `nn.Conv2d`.
        watch: ``watch(module, copy)`` is called for each of the modules, to set a hook on the copy.

    Returns:
        The output, or None and the error that broke the run off. Any host may raise anything.
    """
    args = _guess_input(model) if example_input is None else example_input
    args = tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), args)
    try:
        with torch.no_grad(), torch.device("meta"), torch.random.fork_rng([]), torch.compiler.set_stance("force_eager"):
            twin, twins = _meta_copy(model, modules)
            for module, copied in twins.items():
                watch(module, copied)
            return (twin(*args) if isinstance(args, tuple) else twin(args)), None
    except Exception as error:
        return None, error


def _meta_copy(model: nn.Module, modules: Iterable[M]) -> tuple[nn.Module, dict[M, M]]:
    """The model without data and hooks, and what has become of some of its modules."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for key, value in chain(vars(module).items(), module._parameters.items(), module._buffers.items()):
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().to("meta")
            elif "_hooks" in key:
                memo[id(value)] = OrderedDict()
    return copy.deepcopy(model, memo), {module: memo[id(module)] for module in modules}


def _guess_input(model: nn.Module) -> Tensor:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            size = (2, module.in_channels, _GUESSED_SIZE, _GUESSED_SIZE)
            return torch.empty(size, dtype=module.weight.dtype, device="meta")
    raise ValueError("example_input: expected an input for a model that has no nn.Conv2d to guess one from, got None")
