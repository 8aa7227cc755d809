"""Choose the modules of a surgery and replace them in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from paper_layers._core.wrapped import check_free

Filter = Callable[[nn.Module, str], bool]
M = TypeVar("M", bound=nn.Module)  # A model, of the type that came in.

_OF_ALL_MODULES = vars(nn.Module()).keys()


def matching_modules(
    model: nn.Module,
    wanted: str,
    fits: Callable[[Any], bool],
    done: Callable[[Any], bool],
    filter_fn: Filter | None,
    resembles: Callable[[Any], str | None] = lambda module: None,
) -> dict[Any, str]:
    """Return the modules that fit and that `filter_fn` accepts, each with its accepted name.

    Return nothing if the only matches are `done`, by an earlier swap. `resembles` names a module that does not fit but
    may be what the user meant, for the error.
    """
    check_free(model)
    everything = list(model.named_modules(remove_duplicate=False))
    found = [(name, m) for name, m in everything if fits(m)]
    chosen = {m: name for name, m in reversed(found) if filter_fn is None or filter_fn(m, name)}
    if not chosen and not any(done(m) for _, m in everything):
        rejected = f" that filter_fn accepts ({len(found)} without it)" if found else ""
        raise ValueError(
            f"model: expected at least one {wanted} to swap{rejected}, got none in {type(model).__name__}"
            f"{_passed_over(resembles(m) for m in model.modules() if not fits(m))}"
            f"{'; run it once first, as it has lazy modules' if any(_waits(m) for _, m in everything) else ''}"
        )
    check_sizes((name, module) for module, name in chosen.items())
    for module, name in chosen.items():
        if "forward" in vars(module):
            raise ValueError(f"{format_path(name)}: expected the forward of its class, got one set on the object")
    return dict(reversed(chosen.items()))


def check_sizes(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse lazy modules that have not seen an input yet."""
    for name, module in modules:
        if _waits(module):
            raise ValueError(
                f"{format_path(name)}: expected a module that knows its sizes, got {type(module).__name__}, which "
                "takes them from its first input; run it once first"
            )


def _waits(module: nn.Module) -> bool:
    return any(is_lazy(own) for own in chain(module._parameters.values(), module._buffers.values()) if own is not None)


def _passed_over(names: Iterable[str | None]) -> str:
    counts = Counter(name for name in names if name)
    return f"; it has {', '.join(f'{n} {name}' for name, n in counts.items())}, left alone" if counts else ""


def exactly(*kinds: type[nn.Module]) -> Callable[[Any], bool]:
    """Return a test for modules of exactly these classes; subclasses may compute something else."""
    return lambda module: type(module) in kinds


def format_path(name: str) -> str:
    return f"model.{name}" if name else "model"


def check_names(module: nn.Module, name: str, ours: type[nn.Module], added: Iterable[str] = ()) -> None:
    """Refuse a module with user attributes whose names the new class needs."""
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    found = {n for n in added if hasattr(module, n)} | own & {*dir(ours)} - {*dir(type(module))}
    for taken in sorted(found - {*getattr(type(module), "__constants__", ()), *_OF_ALL_MODULES}):
        raise ValueError(
            f"{format_path(name)}: expected no attribute {taken!r} beside those of {type(module).__name__}, as "
            f"{ours.__name__} has one, got {getattr(module, taken)!r}; rename it, or let filter_fn leave the module out"
        )


def replace_in_place(old: Any, new: nn.Module) -> None:
    """Turn `old` into `new` in place. It keeps its mode, its hooks (the same dictionaries) and the user's attributes.

    The arguments of the old class, its `__constants__`, are dropped.
    """
    new.train(old.training)
    state = {key: value for key, value in vars(old).items() if key not in type(old).__constants__}
    for key, value in vars(new).items():
        if key in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            state[key].update(value)
        elif key not in _OF_ALL_MODULES:
            state[key] = value
    old.__class__ = type(new)
    old.__dict__ = state


def device_and_dtype(model: nn.Module, name: str) -> dict[str, Any]:
    """Return device and dtype of the module's parameters, or of the nearest parameters around it."""
    module = model.get_submodule(name)
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            return {"device": tensor.device, "dtype": tensor.dtype}
    return device_and_dtype(model, name.rpartition(".")[0]) if name else {}
