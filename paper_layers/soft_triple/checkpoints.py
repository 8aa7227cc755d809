"""Load published SoftTriple centers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor

from paper_layers._core.checkpoints import StateDict, load
from paper_layers.soft_triple.loss import SoftTripleLoss

_Loss = TypeVar("_Loss", bound=SoftTripleLoss)

# In a checkpoint of a whole training: `fc` under any prefix, `weight` only under usual names of a loss.
_COLUMNS = re.compile(r"(?:^|\.)fc$")
_ROWS = re.compile(r"^(?:.*\.)?(?:loss|loss_fn|loss_func|metric_loss|criterion|losses\.\w+)\.weight$|^weight$")


def load_official(module: _Loss, state_dict: StateDict) -> _Loss:
    """Load the centers of the official SoftTriple code, or of pytorch-metric-learning, into a loss of this package.

    For Qian et al., "SoftTriple Loss: Deep Metric Learning Without Triplet Sampling", ICCV 2019. The official code and
    pytorch-metric-learning 2.x have ``fc`` of shape (d, C K), with center k of class c in column c K + k;
    pytorch-metric-learning 3.x has ``weight`` of shape (C K, d). The key may also be part of a checkpoint of a whole
    training, as ``criterion.fc``, ``losses.0.weight`` and so on; the other keys are ignored.

    With the same centers, the loss is equal to the official one. It differs from pytorch-metric-learning's with
    ``SparseCentersRegularizer``, which lacks the 1e-5 under the root of each distance. The difference is less than
    tau / 600, but without the 1e-5 the gradient is NaN once two centers coincide.

    Args:
        module: The loss to load into.
        state_dict: The official state dict, of tensors or NumPy arrays, or the path of a file that torch.save or pickle
            wrote. It may be inside ``{"model": ...}`` or ``{"state_dict": ...}``, and have DataParallel's ``module.``
            before each key. No code in a file is run: only tensors, arrays, numbers, strings and containers are loaded.

    Returns:
        `module`.

    Raises:
        TypeError: `state_dict` is neither a mapping nor a path, or a key is not a string.
        pickle.UnpicklingError: A file contains other objects.
        ValueError: The centers are missing or ambiguous, or have another shape.

    Example:
        >>> import torch
        >>> from paper_layers.soft_triple import SoftTripleLoss, load_official
        >>> official = {"fc": torch.randn(64, 98 * 10)}
        >>> loss = load_official(SoftTripleLoss(98, 64, centers_per_class=10), official)
        >>> bool((loss.centers[5, 3] == official["fc"][:, 53]).all())
        True
    """
    columns = False

    def names(key: str) -> Iterator[str]:
        nonlocal columns
        columns = _COLUMNS.search(key) is not None
        yield "centers"

    def adapt(name: str, value: Tensor) -> Tensor:
        rows = value.mT if columns and value.dim() == 2 else value
        classes, k, dim = module.centers.shape
        return rows.reshape(classes, k, dim) if rows.shape == (classes * k, dim) else value

    return load(module, state_dict, names, adapt, lambda key: bool(_COLUMNS.search(key) or _ROWS.search(key)))
