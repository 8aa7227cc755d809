"""Published DeepGCN checkpoints: their keys into ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn

from paper_layers._core.checkpoints import StateDict, load
from paper_layers.deep_gcn.convs import GINConv, SAGEConv
from paper_layers.deep_gcn.perceptron import Perceptron

_Module = TypeVar("_Module", bound=nn.Module)

# What official names wrap convolutions in, and where their networks' parts have other names.
_WRAPPER = re.compile(r"(?<![^.])(gconv|body)\.")
# The last layer, where dropout is not counted as one.
_LAST = re.compile(r"^prediction\.2\.")
_PARTS = {"blocks": "backbone", "fusion": "fusion_block"}


def load_official(module: _Module, state_dict: StateDict) -> _Module:
    """Load a checkpoint of the official DeepGCN code into a network, a block or a convolution of this package.

    For Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as CNNs?", ICCV 2019, in the dense form (1x1
    convolutions) and the sparse one (linear layers). The place of the norm's keys tells the `order` that the module
    must have: ``nn.2`` is "act_norm", ``nn.1`` "norm_act". Nothing is loaded unless all fits.

    Args:
        module: The module to load into.
        state_dict: The official state dict, of tensors or NumPy arrays. It may stand within
            ``{"state_dict": ...}``, and have DataParallel's ``module.`` before each key. Or the
            path of a file that holds one, written by torch.save or, as in model zoos, by pickle. Nothing in a file is
            run: anything but tensors, arrays, numbers, strings and containers is refused.

    Returns:
        `module`.

    Raises:
        TypeError: `state_dict` is neither a mapping nor a path, or a key is not a string.
        pickle.UnpicklingError: A file holds anything else.
        ValueError: Keys are missing or unexpected, shapes differ, or a value holds no numbers that can be copied.

    Example:
        >>> import torch
        >>> from paper_layers.deep_gcn import EdgeConv
        >>> official = {"gconv.nn.0.weight": torch.randn(64, 18, 1, 1), "gconv.nn.0.bias": torch.zeros(64)}
        >>> conv = load_official(EdgeConv(9, 64, norm=None), official)
        >>> bool((conv.nn.linear.weight == official["gconv.nn.0.weight"].flatten(1)).all())
        True
    """
    ours, transposed = dict(_names(module)), _transposed(module)

    def adapt(name: str, value: Tensor) -> Tensor:
        value = value[..., 0, 0] if value.dim() == 4 and value.shape[2:] == (1, 1) else value
        return value.mT if name in transposed else value

    def names(key: str) -> Iterator[str]:
        key = _WRAPPER.sub("", key)
        for name in (key, _LAST.sub("prediction.3.", key)):
            if name in ours:
                yield ours[name]

    return load(module, state_dict, names, adapt)


def _names(module: nn.Module) -> Iterator[tuple[str, str]]:
    """What each parameter and buffer is called in the official code, without wrappers, and here."""
    means = {path for path, m in module.named_modules() if isinstance(m, SAGEConv) and m.reduction == "mean"}
    for path, part in module.named_modules():
        parent, _, last = path.rpartition(".")
        official = _official(path)
        if isinstance(part, Perceptron):
            if parent in means and last == "nn1":
                yield _join(_official(parent), "weight"), _join(path, "linear.weight")
                continue
            if parent in means:
                official = _join(_official(parent), "nn")
            yield from _perceptron_names(part, path, official)
        elif isinstance(part, GINConv):
            yield _join(official, "eps"), _join(path, "eps")
        elif path in means:
            yield _join(official, "bias"), _join(path, "bias")


def _perceptron_names(part: Perceptron, path: str, official: str) -> Iterator[tuple[str, str]]:
    """A sequence of the linear layer and, in the module's order, activation and norm."""
    rest = ["act", "norm"] if part.order == "act_norm" else ["norm", "act"]
    layers = ["linear", *(name for name in rest if getattr(part, name) is not None)]
    for number, name in enumerate(layers):
        for key in getattr(part, name).state_dict():
            yield _join(official, f"{number}.{key}"), _join(path, f"{name}.{key}")


def _transposed(module: nn.Module) -> set[str]:
    """What is stored as (in, out) in the official code."""
    means = (path for path, m in module.named_modules() if isinstance(m, SAGEConv) and m.reduction == "mean")
    return {_join(path, "nn1.linear.weight") for path in means}


def _official(path: str) -> str:
    return ".".join(_PARTS.get(name, name) for name in path.split(".") if name not in ("", "conv"))


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
