"""Published SoftTriple centers: their layouts into ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor

from paper_layers._core.checkpoints import StateDict, load
from paper_layers.soft_triple.loss import SoftTripleLoss

_Loss = TypeVar("_Loss", bound=SoftTripleLoss)

# Beside a network's own keys: nothing else is called fc alone, much ends in weight.
_COLUMNS = re.compile(r"(?:^|\.)fc$")
_ROWS = re.compile(r"^(?:.*\.)?(?:loss|loss_fn|loss_func|metric_loss|criterion|losses\.\w+)\.weight$|^weight$")


def load_official(module: _Loss, state_dict: StateDict) -> _Loss:
    """Load the centers of the official SoftTriple code, or of pytorch-metric-learning, into a loss of this package.

    For Qian et al., "SoftTriple Loss: Deep Metric Learning Without Triplet Sampling", ICCV 2019. The official ``fc``
    and that of pytorch-metric-learning 2.x are of shape (d, C K), with center k of class c in column c K + k; the
    ``weight`` of pytorch-metric-learning 3.x is of shape (C K, d). They may stand alone or, as ``criterion.fc``,
    ``losses.0.weight`` and so on, in the checkpoint of a whole training, of which the rest is left to the network.

    From the same centers the loss is the official one. That of pytorch-metric-learning differs where its
    ``SparseCentersRegularizer`` is used: it lacks the 1e-5 under the root of each distance, less than tau / 600 of
    the loss, but without which its gradient is NaN once two centers coincide.

    Args:
        module: The loss to load into.
        state_dict: The official state dict, of tensors or NumPy arrays. It may stand within
            ``{"model": ...}`` or ``{"state_dict": ...}``, and have DataParallel's ``module.`` before each key. Or the
            path of a file that holds one, written by torch.save or, as in model zoos, by pickle. Nothing in a file is
            run: anything but tensors, arrays, numbers, strings and containers is refused.

    Returns:
        `module`.

    Raises:
        TypeError: `state_dict` is neither a mapping nor a path, or a key is not a string.
        pickle.UnpicklingError: A file holds anything else.
        ValueError: The centers are missing, ambiguous or of another shape.

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
