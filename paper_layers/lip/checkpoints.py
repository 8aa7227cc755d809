"""Load published LIP checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from paper_layers._core.checkpoints import StateDict, load

_Module = TypeVar("_Module", bound=nn.Module)

# Official names and ours, applied in order; a name starts the key or follows a dot.
_RENAMED = [
    (re.compile(rf"(?<![^.]){official}\."), ours)
    for official, ours in (
        (r"maxpool", "pool."),
        (r"bottleneck_shared\.logit", "stem."),
        (r"conv2\.0", "pool."),
        (r"conv2\.1", "conv2."),
        (r"downsample\.lip", "shortcut_pool."),
        (r"downsample\.conv", "downsample.0."),
        (r"downsample\.bn", "downsample.1."),
        (r"postprocessing", "logit."),
        (r"(logit|stem)\.bn(\d?)", r"\1.norm\2."),
    )
]
_LOGIT_LAYER = re.compile(r"(?<![^.])logit\.(conv|norm)([123]?)\.")


def _candidates(official: str) -> Iterator[str]:
    """Yield the names that an official key may have here, depending on the form of the logit module."""
    key = official
    for pattern, ours in _RENAMED:
        key = pattern.sub(ours, key)
    yield key
    layer = _LOGIT_LAYER.search(key)
    if layer is not None:
        kind, number = layer.groups()
        places = [f"logit.stem.{kind}{number}."] if number in ("1", "2") else [f"logit.head.{kind}."]
        if number == "1":
            places.append(f"logit.{kind}.")
        for place in places:
            yield key[: layer.start()] + place + key[layer.end() :]


def load_official(module: _Module, state_dict: StateDict) -> _Module:
    """Load a checkpoint of the official LIP code into a model, a block or a pooling of this package.

    For Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019: `LIPResNet`, `LIPDenseNet`,
    `LIPBottleneck`, `LIPTransition` and `LIPPool2d` in each form of its logit. Nothing is loaded unless all fits.

    Args:
        module: The module to load into.
        state_dict: The official state dict of tensors or NumPy arrays, or the path of its file, written by torch.save
            or by pickle. It may be inside ``{"state_dict": ...}``, and its keys may start with DataParallel's
            ``module.``. No code in a file runs: only tensors, arrays, numbers, strings and containers are accepted.

    Returns:
        `module`.

    Raises:
        TypeError: `state_dict` is neither a mapping nor a path, or a key is not a string.
        pickle.UnpicklingError: A file holds something else.
        ValueError: Keys are missing or unexpected, shapes differ, or a value can't be copied.

    Example:
        >>> import torch
        >>> from paper_layers.lip import LIPPool2d
        >>> norm = {"logit.bn.weight": torch.ones(8), "logit.bn.bias": torch.zeros(8)}
        >>> official = {"logit.conv.weight": torch.randn(8, 8, 3, 3), **norm}
        >>> pool = load_official(LIPPool2d(8, logit="simplified"), official)
        >>> bool((pool.logit.conv.weight == official["logit.conv.weight"]).all())
        True
    """
    return load(module, state_dict, _candidates)
