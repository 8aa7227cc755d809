"""Pools and strided convolutions become LIP pooling."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from paper_layers._core._torch_private import AvgPool, Conv, MaxPool
from paper_layers._core.surgery import (
    Filter,
    check_names,
    device_and_dtype,
    exactly,
    format_path,
    matching_modules,
    replace_in_place,
)
from paper_layers._core.trial import M, dry_run
from paper_layers.lip.conv import FOLDS, LIPConv2d, Refusal, own_logit, stride_pool
from paper_layers.lip.pool import LIPPool2d, Logit

_FUNCTIONS = re.compile(r"\b(?:max|avg)_pool2d\(")
# What a pool may be told that LIP cannot do, and the values that ask for nothing.
_UNSUPPORTED = {"dilation": (1, (1,), [1], (1, 1), [1, 1]), "return_indices": (False,), "divisor_override": (None,)}


def _input_channels(model: nn.Module, modules: Mapping[M, str], example_input: Any) -> dict[M, int]:
    """How many channels reach each module, by a trial run.

    A run that breaks off after it has reached all of them (say at a linear layer of another image size) will do.
    """
    seen: dict[M, set[int]] = {module: set() for module in modules}

    def watch(module: M, copied: M) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[module].add((args[0] if args else kwargs["input"]).shape[-3])

        # Hooks of the module's own decide what reaches it.
        copied._forward_pre_hooks.update(module._forward_pre_hooks)
        copied._forward_pre_hooks_with_kwargs.update(module._forward_pre_hooks_with_kwargs)
        copied.register_forward_pre_hook(hook, with_kwargs=True)

    _, failure = dry_run(model, modules, example_input, watch, lambda: all(seen.values()))
    for module, name in modules.items():
        if not seen[module] and failure is not None:
            raise ValueError(
                f"example_input: expected an input that runs through the model on the meta device as far as "
                f"{format_path(name)}, got {type(failure).__name__}: {failure}. Pass another one, or swap the part of "
                "the model that holds the pools."
            ) from failure
        if len(seen[module]) != 1:
            counts = " and ".join(map(str, sorted(seen[module]))) or "no input at all in the trial run"
            raise ValueError(
                f"{format_path(name)}: expected one number of channels, got {counts}; filter_fn can leave it out"
            )
    return {module: counts.pop() for module, counts in seen.items()}


def pooling(
    model: nn.Module,
    logit: Logit = "bottleneck",
    *,
    bottleneck_width: int = 128,
    example_input: Any = None,
    filter_fn: Filter | None = None,
) -> nn.Module:
    """Turn every `nn.MaxPool2d` and `nn.AvgPool2d` of a finished model into LIP pooling of the same geometry.

    The surgery of Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019; `LIPPool2d` has the equation.
    Adaptive (global) pools, subclasses and calls of `F.max_pool2d` are left alone. Channel counts come from a run of
    a copy of the model on the meta device or, for a model that lives by its hooks or by data, of itself in evaluation
    mode; neither changes the model or the random state. Forward pre-hooks of the pools run there, as they may change
    what a pool sees.

    Args:
        model: Any module; changed in place.
        logit: As in `LIPPool2d`; of a module, each pool gets a copy.
        bottleneck_width: As in `LIPPool2d`.
        example_input: A tensor, or a tuple of the model's arguments, for the run.
            Default: two images of 224 x 224 with the channels of the first `nn.Conv2d`.
        filter_fn: ``filter_fn(module, name) -> bool``, which pools to swap; default all.

    Returns:
        `model`; unchanged if it already holds LIP pools and `filter_fn` accepts no further pool.

    Raises:
        TypeError: `model` is not a module.
        ValueError: Nothing to swap; a pool without LIP counterpart (`dilation`, `return_indices`,
            `divisor_override`); a pool that sees no input or several channel counts; the run failed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers import swap
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2))
        >>> _ = swap.pooling(model, logit="projection")
        >>> model[2]  # doctest: +ELLIPSIS
        LIPPool2d(
          16, kernel_size=2, stride=2, padding=0, logit='projection'...
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 16, 15, 15])
    """
    kinds = exactly(nn.MaxPool2d, nn.AvgPool2d)
    pools = matching_modules(model, "nn.MaxPool2d or nn.AvgPool2d", kinds, exactly(LIPPool2d), filter_fn, _pool_like)
    for pool, name in pools.items():
        for option, neutral in _UNSUPPORTED.items():
            value = getattr(pool, option, neutral[0])
            if value not in neutral:
                raise ValueError(
                    f"{format_path(name)}: expected {option}={neutral[0]}, got {value}; filter_fn can leave it out"
                )
    if not pools:
        return model
    channels = _input_channels(model, pools, example_input)
    built = []
    for pool, name in pools.items():
        place = device_and_dtype(model, name)
        geometry: dict[str, Any] = {
            key: getattr(pool, key) for key in ("kernel_size", "stride", "padding", "ceil_mode")
        }
        if geometry["stride"] in ((), []):  # Torch's other way to say that it is the kernel's size.
            geometry["stride"] = pool.kernel_size
        lip = LIPPool2d(
            channels[pool], logit=own_logit(logit, place), bottleneck_width=bottleneck_width, **geometry, **place
        )
        check_names(pool, name, LIPPool2d, {*vars(lip), *lip._modules})
        built.append(lip)
    for pool, new in zip(pools, built, strict=True):
        replace_in_place(pool, new)
    return model


def strided_conv(
    model: nn.Module, logit: Logit = "bottleneck", *, bottleneck_width: int = 128, filter_fn: Filter | None = None
) -> nn.Module:
    """Turn every strided `nn.Conv2d` of a finished model into the same one with stride 1, followed by LIP pooling.

    The surgery of Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019; see `LIPConv2d`. The convolutions
    keep their `Parameter` objects and state-dict keys, and cost as many times more as their stride has pixels. So patch
    embeddings, whose kernel is their stride and above 3, are left alone unless a `filter_fn` accepts them.
    Fold norms into convolutions and re-parametrise blocks (RepVGG, MobileOne) before: it is an error afterwards.

    Args:
        model: Any module; changed in place.
        logit: As in `LIPPool2d`; of a module, each pool gets a copy.
        bottleneck_width: As in `LIPPool2d`.
        filter_fn: ``filter_fn(module, name) -> bool``, which convolutions to swap; default all but patch embeddings.

    Returns:
        `model`; unchanged if it already holds a `LIPConv2d` and `filter_fn` accepts no further convolution.

    Raises:
        TypeError: `model` is not a module.
        ValueError: Nothing to swap.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers import swap
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU())
        >>> type(swap.strided_conv(model)[0]).__name__
        'LIPConv2d'
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 16, 16, 16])
    """
    plain = exactly(nn.Conv2d)

    def fits(module: Any) -> bool:
        wanted = filter_fn is not None or module is model or not _embeds_patches(module)
        return plain(module) and max(module.stride) > 1 and wanted

    convs = matching_modules(model, "strided nn.Conv2d", fits, exactly(LIPConv2d), filter_fn, _conv_like)
    for conv, name in convs.items():
        check_names(conv, name, LIPConv2d, ["pool"])
    pools = [stride_pool(conv, logit, bottleneck_width, device_and_dtype(conv, "")) for conv in convs]
    for (conv, name), pool in zip(convs.items(), pools, strict=True):
        conv.__class__ = LIPConv2d
        cast(LIPConv2d, conv).take_stride(pool)
        _refuse_to_fold(model, name)
    return model


def _pool_like(module: nn.Module) -> str | None:
    kind = type(module)
    if isinstance(module, MaxPool | AvgPool):
        return kind.__name__
    if not kind.__module__.startswith(("torch.nn.", "paper_layers.")) and "forward" in vars(kind):
        try:
            if _FUNCTIONS.search(inspect.getsource(kind.forward)):
                return f"{kind.__name__} with calls of max_pool2d or avg_pool2d, which are no modules"
        except (OSError, TypeError):  # No source.
            pass
    return None


def _conv_like(module: Any) -> str | None:
    if not isinstance(module, Conv) or module.transposed or max(module.stride) == 1:
        return None
    if type(module) is nn.Conv2d:
        return "nn.Conv2d with kernel_size equal to stride (patch embeddings: a filter that accepts them swaps them)"
    return type(module).__name__


def _embeds_patches(conv: Any) -> bool:
    """Return whether a convolution cuts an image into patches, where pooling would make no sense."""
    return type(conv) is nn.Conv2d and conv.kernel_size == conv.stride and min(conv.stride) > 3


def _refuse_to_fold(model: nn.Module, name: str) -> None:
    """Make blocks around a convolution refuse to fold it: they read its weight, whatever its class."""
    for end in range(name.count(".") + 1):
        block = model.get_submodule(".".join(name.split(".")[:end]))
        for method in FOLDS:
            if _takes_nothing(getattr(type(block), method, None)):
                vars(block)[method] = Refusal(method, format_path(name))


def _takes_nothing(method: Any) -> bool:
    """Return whether a method can be called without arguments, as those that fold are: others share a name alone."""
    if not inspect.isfunction(method):
        return False
    _, *arguments = inspect.signature(method).parameters.values()
    ways = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(a.default is not a.empty or a.kind in ways for a in arguments)
