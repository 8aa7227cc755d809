"""Load published PointRend checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from paper_layers._core.checkpoints import StateDict, load
from paper_layers.point_rend.coarse import BoxHead, CoarseMaskHead
from paper_layers.point_rend.head import PointRendHead
from paper_layers.point_rend.implicit import ImplicitPointHead

_Module = TypeVar("_Module", bound=nn.Module)

# A head's keys in a whole model, also in old checkpoints.
_PLACE = re.compile(r"(?:^|\.)(?:mask_)?(point|coarse|parameter)_head\.(.+)$")
# Official names -> ours, by head.
_RENAMED: dict[str, list[tuple[re.Pattern[str], Any]]] = {
    "point": [(re.compile(r"^fc(\d+)\."), lambda found: f"layers.{int(found[1]) - 1}.")],
    "coarse": [
        (re.compile(r"^coarse_mask_fc"), "fc"),
        (re.compile(r"^reduce_channel_dim_conv"), "reduce_channels"),
        (re.compile(r"^reduce_spatial_dim_conv"), "reduce_size"),
    ],
}
_RENAMED["parameter"] = _RENAMED["coarse"]
# The first matching class counts, as a CoarseMaskHead is a BoxHead too.
_HEADS: dict[type[nn.Module], str] = {
    PointRendHead: "point",
    ImplicitPointHead: "point",
    CoarseMaskHead: "coarse",
    BoxHead: "parameter",
}


def load_official(module: _Module, state_dict: StateDict) -> _Module:
    """Load a checkpoint of the official PointRend code (detectron2's project) into a head of this package.

    For Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as Rendering", CVPR 2020: `PointRendHead`,
    `CoarseMaskHead`, `PointRendSemantic` and `PointRendMask`; and for Cheng, Parkhi, Kirillov, "Pointly-Supervised
    Instance Segmentation", CVPR 2022: `ImplicitPointRendMask` and its heads. From a whole model's checkpoint, the keys
    of ``point_head``, ``coarse_head`` and ``parameter_head`` are loaded, also under their old names
    (``mask_point_head``, ``coarse_mask_fc1``); other keys are skipped. If anything does not match, nothing is loaded.

    Args:
        module: The module to load into.
        state_dict: The official state dict of tensors or NumPy arrays, or the path of a file that holds it, written by
            torch.save or, as in model zoos, by pickle. It may be inside ``{"model": ...}`` or ``{"state_dict": ...}``,
            and its keys may start with DataParallel's ``module.``. Loading a file does not run code from it: anything
            but tensors, arrays, numbers, strings and containers is refused.

    Returns:
        `module`.

    Raises:
        TypeError: `state_dict` is neither a mapping nor a path, or a key is not a string.
        pickle.UnpicklingError: A file holds another type.
        ValueError: Keys are missing or unexpected, shapes differ, or a value is not a tensor or array of numbers.

    Example:
        >>> import torch
        >>> from paper_layers.point_rend import PointRendHead
        >>> names = {"fc1.weight": (8, 6, 1), "fc1.bias": (8,), "predictor.weight": (2, 8, 1), "predictor.bias": (2,)}
        >>> official = {f"sem_seg_head.point_head.{name}": torch.randn(shape) for name, shape in names.items()}
        >>> head = PointRendHead(4, 2, hidden_features=8, num_fc=1, coarse_pred_each_layer=False)
        >>> head = load_official(head, {**official, "backbone.stem.conv1.weight": torch.ones(1)})
        >>> bool((head.layers[0].weight == official["sem_seg_head.point_head.fc1.weight"][..., 0]).all())
        True
    """
    paths, own = dict(_paths(module)), module.state_dict()

    def place(key: str) -> tuple[str, str] | None:
        """Return the head that a key belongs to, and the name within it; None if the module does not have the head."""
        found = _PLACE.search(key)
        if found is not None:
            return (found[1], found[2]) if found[1] in paths else None
        root = next((head for head, path in paths.items() if path == ""), None)
        return (root, key) if root is not None and (key.count(".") == 1 or key in own) else None

    def names(key: str) -> Iterator[str]:
        head, name = place(key) or ("", "")
        for pattern, ours in _RENAMED.get(head, ()):
            name = pattern.sub(ours, name)
        yield paths.get(head, "") + name

    def adapt(name: str, value: Tensor) -> Tensor:
        return value.squeeze(-1) if value.dim() == 3 else value

    return load(module, state_dict, names, adapt, lambda key: place(key) is not None)


def _paths(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield each head of a module, and the prefix of its parameters' names."""
    for path, part in module.named_modules():
        head = next((head for kind, head in _HEADS.items() if isinstance(part, kind)), None)
        if head is not None:
            yield head, f"{path}." if path else ""
