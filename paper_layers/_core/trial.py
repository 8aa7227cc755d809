"""Run a model to learn the shapes inside it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from paper_layers._core._torch_private import tree_map_only
from paper_layers._core.surgery import M, check_sizes

_GUESSED_SIZE = 224
_HOOKS = [key for key in vars(nn.Module()) if "_hooks" in key]  # And what is noted of some of them.
_META = torch.device("meta")

# A model to run, what has become of some modules, and the device that it is on.
Ready = tuple[nn.Module, Mapping[M, M], torch.device]


def dry_run(
    model: nn.Module,
    modules: Iterable[M],
    example_input: Any,
    watch: Callable[[M, M], Any],
    enough: Callable[[], bool] = lambda: False,
) -> tuple[Any, Exception | None]:
    """Run a copy of the model on the meta device, without data, random numbers or hooks except those set here.

    A run that breaks off is tried again in evaluation mode, as detectors want targets in training. Some hosts live by
    their hooks, or by their data: at last the model itself runs in evaluation mode, once, and is as before afterwards.

    Args:
        model: Any module, which is left as it is.
        modules: Some of its modules.
        example_input: A tensor or a tuple of arguments; None for two images with the channels of the first `nn.Conv2d`.
        watch: ``watch(module, copy)`` is called for each of the modules, to set a hook on the copy.
        enough: Whether a run that broke off has gone far enough.

    Returns:
        The output, or None and the error that broke the run off. Any host may raise anything.

    Raises:
        ValueError: A lazy module has not seen an input yet; there is none, and none can be guessed.
    """
    check_sizes(model.named_modules())
    examples = list(_guess_inputs(model)) if example_input is None else [example_input]
    inputs = [example if isinstance(example, tuple) else (example,) for example in examples]
    tries: list[tuple[Any, tuple[Any, ...], bool]] = []
    for args in inputs:
        tries += [(_copied, args, training) for training in ((True, False) if model.training else (False,))]
        if model.training and len(args) > 1:  # In evaluation no host needs targets, whose values are not there.
            tries.append((_copied, args[:1], False))
    tries.append((_itself, inputs[0], False))
    reported: Exception | None = None  # The first guess's error, in the model's own mode.
    for ready, args, training in tries:
        output, failure = _try(ready(model, modules), args, watch, training)
        if failure is None or enough():
            return output, failure
        reported = reported or failure
    return None, reported


def _try(
    ready: AbstractContextManager[Ready[M]], args: tuple[Any, ...], watch: Callable[[M, M], Any], training: bool
) -> tuple[Any, Exception | None]:
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), ready as (model, modules, device):
            if not training:
                model.eval()
            for module, copied in modules.items():
                watch(module, copied)
            return model(*tree_map_only(Tensor, lambda tensor: _on(device, tensor), args)), None
    except Exception as error:
        return None, error


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, or zeros if it has no data."""
    if _META in (device, tensor.device):
        return torch.zeros_like(tensor, device=device)
    return tensor.detach().clone().to(device)


@contextmanager
def _copied(model: nn.Module, modules: Iterable[M]) -> Iterator[Ready[M]]:
    """Yield the model without data and without hooks."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in chain(vars(module).values(), module._parameters.values(), module._buffers.values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().to(_META)
        memo.update((id(vars(module)[key]), type(vars(module)[key])()) for key in _HOOKS)
    with _META, torch.random.fork_rng([]):
        twin = copy.deepcopy(model, memo)
        yield twin, {module: memo[id(module)] for module in modules}, _META


@contextmanager
def _itself(model: nn.Module, modules: Iterable[M]) -> Iterator[Ready[M]]:
    """Yield the model, then restore all attributes of its modules and their contents."""
    devices = [tensor.device for tensor in chain(model.parameters(), model.buffers())]
    held = [own for module in model.modules() for own in (vars(module), *vars(module).values())]
    containers: list[Any] = [own for own in held if type(own) in (dict, OrderedDict, list, set)]
    before = [(container, container.copy()) for container in containers]
    for container in containers:
        if isinstance(container, dict):  # Buffers, which may be written in place: the run has copies of them.
            container.update((name, own.clone()) for name, own in container.items() if type(own) is Tensor)
    try:
        # fork_rng keeps the generator of the CPU, and those of the CUDA devices that it is told of.
        with torch.random.fork_rng([device for device in {*devices} if device.type == "cuda"]):
            yield model, {module: module for module in modules}, devices[0] if devices else torch.device("cpu")
    finally:
        for container, content in before:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


def _guess_inputs(model: nn.Module) -> Iterator[Tensor]:
    """Yield timm's input size for its model, and two images with the first convolution's channels."""
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    known = getattr(model, "pretrained_cfg", None)
    if isinstance(known, Mapping) and known.get("input_size"):
        yield torch.empty((2, *known["input_size"]), dtype=dtypes[0] if dtypes else None, device="meta")
    module: Any
    for module in model.modules():
        # An nn.Conv2d, or a layer with its attributes in its place.
        if getattr(module, "transposed", None) is False and len(module.kernel_size) == 2:
            size: Any = (2, module.in_channels, _GUESSED_SIZE, _GUESSED_SIZE)
            yield torch.empty(size, dtype=module.weight.dtype, device="meta")
            return
    if not known:
        raise ValueError(
            "example_input: expected an input for a model that has no nn.Conv2d to guess one from, got None"
        )
