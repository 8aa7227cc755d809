"""Published checkpoints into modules of this package: what the papers' `load_official` share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_Module = TypeVar("_Module", bound=nn.Module)
StateDict = Mapping[str, Any] | str | os.PathLike[str]


def load(
    module: _Module,
    state_dict: StateDict,
    names: Callable[[str], Iterable[str]],
    adapt: Callable[[str, Tensor], Tensor] = lambda name, value: value,
    meant: Callable[[str], bool] = lambda key: True,
) -> _Module:
    """Load an official state dict, or nothing at all where it does not fit.

    `names` gives what an official key may be called here, the first that is there and free being meant; `adapt` turns
    a value into what stands here under a name; `meant` says which keys are for this module, the others being a host's.
    """
    found: Any = state_dict
    if isinstance(state_dict, str | os.PathLike):
        found = torch.load(state_dict, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):
        if isinstance(found, Mapping) and wrapper in found:
            found = found[wrapper]
    if not isinstance(found, Mapping):
        raise TypeError(f"state_dict: expected a mapping or a path, got {type(found).__name__}")
    official: dict[str, Any] = dict(found)
    if official and all(key.startswith("module.") for key in official):
        official = {key.removeprefix("module."): value for key, value in official.items()}
    official = {key: value for key, value in official.items() if meant(key)}

    own = module.state_dict()
    renamed: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, value in official.items():
        name = next((name for name in names(key) if name in own and name not in renamed), None)
        if name is None or not isinstance(value, Tensor):
            problems.append(f"unexpected {key}")
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
