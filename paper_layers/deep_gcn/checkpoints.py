"""Load published DeepGCN checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn

from paper_layers._core.checkpoints import StateDict, load
from paper_layers.deep_gcn.convs import GINConv, SAGEConv
from paper_layers.deep_gcn.perceptron import Perceptron

_Module = TypeVar("_Module", bound=nn.Module)

# Official names have an extra `gconv.` or `body.`, and call two parts differently.
_WRAPPER = re.compile(r"(?<![^.])(gconv|body)\.")
# Some official networks do not count dropout as a layer, so the last layer has number 2.
_LAST = re.compile(r"^prediction\.2\.")
_PARTS = {"blocks": "backbone", "fusion": "fusion_block"}


def load_official(module: _Module, state_dict: StateDict) -> _Module:
    """Load a checkpoint of the official DeepGCN code into a network, a block or a convolution of this package.

    For the dense code (1x1 convolutions) and the sparse code (linear layers) of Li, Müller, Thabet, Ghanem, "DeepGCNs:
    Can GCNs Go as Deep as CNNs?", ICCV 2019. The module needs the checkpoint's `order`: "act_norm" if the norm's keys
    begin with ``nn.2``, "norm_act" if they begin with ``nn.1``. Nothing is loaded unless all keys and shapes fit.

    Args:
        module: The module to load into.
        state_dict: The official state dict of tensors or NumPy arrays, or the path of its file, written by torch.save
            or, as in model zoos, by pickle. It may be inside ``{"state_dict": ...}``, with DataParallel's ``module.``
            before each key. No code in a file runs: only tensors, arrays, numbers, strings and containers are read.

    Returns:
        `module`.

    Raises:
        TypeError: `state_dict` is neither a mapping nor a path, or a key is not a string.
        pickle.UnpicklingError: A file holds an object of another type.
        ValueError: Keys are missing or unexpected, shapes differ, or a value can't be copied as numbers.

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
    """Yield the official name, without wrappers, and our name of each parameter and buffer."""
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
    """Yield both names for a perceptron, which the official code numbers: linear, then by `order` act and norm."""
    rest = ["act", "norm"] if part.order == "act_norm" else ["norm", "act"]
    layers = ["linear", *(name for name in rest if getattr(part, name) is not None)]
    for number, name in enumerate(layers):
        for key in getattr(part, name).state_dict():
            yield _join(official, f"{number}.{key}"), _join(path, f"{name}.{key}")


def _transposed(module: nn.Module) -> set[str]:
    """Return the names of weights that the official code stores as (in, out)."""
    means = (path for path, m in module.named_modules() if isinstance(m, SAGEConv) and m.reduction == "mean")
    return {_join(path, "nn1.linear.weight") for path in means}


def _official(path: str) -> str:
    return ".".join(_PARTS.get(name, name) for name in path.split(".") if name not in ("", "conv"))


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
