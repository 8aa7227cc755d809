"""Load published checkpoints into modules of this package, for the papers' `load_official`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from paper_layers._core.pickles import is_array, read, to_tensor

_Module = TypeVar("_Module", bound=nn.Module)
StateDict = Mapping[str, Any] | str | os.PathLike[str]


def load(
    module: _Module,
    state_dict: StateDict,
    names: Callable[[str], Iterable[str]],
    adapt: Callable[[str, Tensor], Tensor] = lambda name, value: value,
    meant: Callable[[str], bool] = lambda key: True,
) -> _Module:
    """Load an official state dict; change nothing if it does not fit.

    `names` gives the names that an official key may have here; the first that exists here and is not yet taken is used.
    `adapt` turns a value into the one that belongs under a name here. `meant` says which keys are for this module; the
    others belong to its host.
    """
    official = {key: value for key, value in _entries(state_dict).items() if meant(key)}
    own = module.state_dict()
    renamed: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, value in official.items():
        name = next((name for name in names(key) if name in own and name not in renamed), None)
        if name is None or not is_array(value):
            problems.append(f"unexpected {key}")
            continue
        try:
            value = _plain(to_tensor(value), own[name])
        except ValueError as error:
            problems.append(f"{key}, {error}")
            renamed[name] = own[name]
            continue
        renamed[name] = adapt(name, value)
        if not is_lazy(own[name]) and own[name].shape != renamed[name].shape:
            problems.append(f"{key} of shape {tuple(value.shape)} where {name} has {tuple(own[name].shape)}")
    for name in own:
        if name in renamed:
            continue
        if name.endswith("num_batches_tracked"):  # Older versions of torch did not save it.
            renamed[name] = own[name]
        else:
            problems.append(f"missing {name}")
    if problems:
        kind = type(module).__name__
        raise ValueError(f"state_dict: expected the official checkpoint of this {kind}, got " + "; ".join(problems))
    module.load_state_dict(renamed)
    return module


def _entries(state_dict: StateDict) -> dict[str, Any]:
    """Return the names and values of a state dict, or of a file that holds one under the usual wrappers."""
    found: Any = read(state_dict) if isinstance(state_dict, str | os.PathLike) else state_dict
    for wrapper in ("state_dict", "model"):
        if isinstance(found, Mapping) and wrapper in found:
            found = found[wrapper]
    if not isinstance(found, Mapping):
        raise TypeError(f"state_dict: expected a mapping or a path, got {type(found).__name__}")
    for key in found:
        if not isinstance(key, str):
            raise TypeError(f"state_dict: expected strings as keys, got {key!r}")
    # torch.compile puts this prefix before the keys of a compiled module.
    entries = {key.replace("_orig_mod.", ""): value for key, value in found.items()}
    if all(key.startswith("module.") for key in entries):
        return {key.removeprefix("module."): value for key, value in entries.items()}
    return entries


def _plain(value: Tensor, own: Tensor) -> Tensor:
    """Return the value if it can be copied to the parameter or buffer as it is."""
    if own.is_meta:
        raise ValueError("which a module on the meta device can't hold: move it with to_empty first")
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        kind = "quantized" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
        raise ValueError(f"a {kind} tensor where a dense one is expected")
    if value.is_meta:
        raise ValueError("a tensor on the meta device, which holds no values")
    if value.is_complex() and not own.is_complex():
        raise ValueError(f"a tensor of {value.dtype} where {own.dtype} is expected")
    return value
