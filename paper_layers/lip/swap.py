"""Turn pools and strided convolutions into LIP pooling."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from paper_layers._core._torch_private import AvgPool, Conv, MaxPool
from paper_layers._core.surgery import (
    Filter,
    M,
    check_names,
    device_and_dtype,
    exactly,
    format_path,
    matching_modules,
    replace_in_place,
)
from paper_layers._core.trial import dry_run
from paper_layers.lip._folding import refuse_to_fold
from paper_layers.lip._stride_pool import own_logit, stride_pool
from paper_layers.lip.conv import LIPConv2d
from paper_layers.lip.pool import LIPPool2d, Logit

_FUNCTIONS = re.compile(r"\b(?:max|avg)_pool2d\(")
# Pool arguments that LIP lacks, with their no-op values.
_UNSUPPORTED = {"dilation": (1, (1,), [1], (1, 1), [1, 1]), "return_indices": (False,), "divisor_override": (None,)}


def _input_channels(model: nn.Module, modules: Mapping[M, str], example_input: Any) -> dict[M, int]:
    """Return how many channels reach each module, found by a trial run.

    The run may fail after it has reached all of them, say at a linear layer for another image size.
    """
    seen: dict[M, set[int]] = {module: set() for module in modules}

    def watch(module: M, copied: M) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[module].add((args[0] if args else kwargs["input"]).shape[-3])

        # The module's own hooks may change its input.
        copied._forward_pre_hooks.update(module._forward_pre_hooks)
        copied._forward_pre_hooks_with_kwargs.update(module._forward_pre_hooks_with_kwargs)
        copied.register_forward_pre_hook(hook, with_kwargs=True)

    _, failure = dry_run(model, modules, example_input, watch, lambda: all(seen.values()))
    for module, name in modules.items():
        if not seen[module] and failure is not None:
            raise ValueError(
                f"example_input: expected an input that runs through the model on the meta device as far as "
                f"{format_path(name)}, got {type(failure).__name__}: {failure}. Pass another input, or swap only "
                "the submodule that holds the pools."
            ) from failure
        if len(seen[module]) != 1:
            counts = " and ".join(map(str, sorted(seen[module]))) or "no input at all in the trial run"
            raise ValueError(
                f"{format_path(name)}: expected one number of channels, got {counts}; filter_fn can leave it out"
            )
    return {module: counts.pop() for module, counts in seen.items()}


def pooling(
    model: M,
    logit: Logit = "bottleneck",
    *,
    hidden_channels: int = 128,
    example_input: Any = None,
    filter_fn: Filter | None = None,
) -> M:
    """Turn every `nn.MaxPool2d` and `nn.AvgPool2d` of a finished model into LIP pooling of the same geometry.

    The surgery of Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019; `LIPPool2d` has the equation.
    Adaptive (global) pools, subclasses and calls of `F.max_pool2d` are left alone. The numbers of channels come from a
    run of a copy of the model on the meta device, or, if its hooks or data prevent that, from a run of the model in
    evaluation mode. Neither run changes the model or the random state. The pools' forward pre-hooks run, since they
    may change a pool's input.

    Args:
        model: Any module; changed in place.
        logit: See `LIPPool2d`; each pool gets a copy of a module.
        hidden_channels: See `LIPPool2d`.
        example_input: A tensor, or a tuple of the model's arguments, for the run.
            Default: two images of 224 x 224 with the channels of the first `nn.Conv2d`.
        filter_fn: ``filter_fn(module, name) -> bool``, which pools to swap; default all.

    Returns:
        `model`; unchanged if it already holds LIP pools and `filter_fn` accepts no further pool.

    Raises:
        TypeError: `model` is not a module.
        ValueError: Nothing to swap; a pool with an option that LIP lacks (`dilation`, `return_indices`,
            `divisor_override`); a pool that gets no input or several numbers of channels; the run failed.

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
        factory = device_and_dtype(model, name)
        geometry: dict[str, Any] = {
            key: getattr(pool, key) for key in ("kernel_size", "stride", "padding", "ceil_mode")
        }
        if geometry["stride"] in ((), []):  # To torch, an empty stride is the kernel's size.
            geometry["stride"] = pool.kernel_size
        lip = LIPPool2d(
            channels[pool], logit=own_logit(logit, factory), hidden_channels=hidden_channels, **geometry, **factory
        )
        check_names(pool, name, LIPPool2d, {*vars(lip), *lip._modules})
        built.append(lip)
    for pool, new in zip(pools, built, strict=True):
        replace_in_place(pool, new)
    return model


def strided_conv(
    model: M, logit: Logit = "bottleneck", *, hidden_channels: int = 128, filter_fn: Filter | None = None
) -> M:
    """Turn every strided `nn.Conv2d` of a finished model into the same one with stride 1, followed by LIP pooling.

    The surgery of Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019; see `LIPConv2d`. The convolutions
    keep their `Parameter` objects and state-dict keys. Each costs as many times more as its stride has pixels, so patch
    embeddings, with a kernel equal to a stride above 3, are left alone unless a `filter_fn` accepts them. Fold norms
    into convolutions and re-parametrize blocks (RepVGG, MobileOne) before the swap: afterwards it is an error.

    Args:
        model: Any module; changed in place.
        logit: See `LIPPool2d`; each pool gets a copy of a module.
        hidden_channels: See `LIPPool2d`.
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
    pools = [stride_pool(conv, logit, hidden_channels, device_and_dtype(conv, "")) for conv in convs]
    for (conv, name), pool in zip(convs.items(), pools, strict=True):
        conv.__class__ = LIPConv2d
        cast(LIPConv2d, conv).take_stride(pool)
        refuse_to_fold(model, name)
    return model


def _pool_like(module: nn.Module) -> str | None:
    kind = type(module)
    if isinstance(module, MaxPool | AvgPool):
        return kind.__name__
    if not kind.__module__.startswith(("torch.nn.", "paper_layers.")) and "forward" in vars(kind):
        try:
            if _FUNCTIONS.search(inspect.getsource(kind.forward)):
                return f"{kind.__name__} with calls of max_pool2d or avg_pool2d, which are not modules"
        except (OSError, TypeError):  # The source is not available.
            pass
    return None


def _conv_like(module: Any) -> str | None:
    if not isinstance(module, Conv) or module.transposed or max(module.stride) == 1:
        return None
    if type(module) is nn.Conv2d:
        return "nn.Conv2d with kernel_size equal to stride (patch embeddings: a filter that accepts them swaps them)"
    return type(module).__name__


def _embeds_patches(conv: Any) -> bool:
    """Return True if a convolution cuts an image into patches, where pooling would not make sense."""
    return type(conv) is nn.Conv2d and conv.kernel_size == conv.stride and min(conv.stride) > 3
