"""Run one split of a model's split batch norms on whole batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from paper_layers._core import checks
from paper_layers._core.recompute import reopened
from paper_layers.adv_prop.norm import SplitBatchNorm


@contextmanager
def use_split(model: nn.Module, split: int, *, update_statistics: bool = True) -> Iterator[None]:
    """Let every split batch norm in a model normalize the whole batch by one split's norm.

    Use it in eval, with the split's running statistics, to attack the auxiliary norms (Xie et al., "Adversarial
    Examples Improve Image Recognition", CVPR 2020) or to measure accuracy through them. In training the norm uses the
    statistics of the batch. A norm's weight, bias and statistics read as the split's, for tools that fold norms into
    convolutions. Contexts nest: the inner one wins, and the end of each restores what it found.

    When `torch.utils.checkpoint` recomputes a forward, it runs the split of the first run, even if the backward is
    outside the context. Run the backward of a checkpointed forward without a split outside.

    Args:
        model: A model with split batch norms.
        split: 0 for the main norm, 1 for the first auxiliary norm, and so on.
        update_statistics: If False, batches in training leave the running statistics alone.

    Raises:
        TypeError: `split` is not an int.
        ValueError: The model does not have a split batch norm, or a norm has too few splits.

    Example:
        >>> import torch
        >>> from paper_layers import SplitBatchNorm2d
        >>> from paper_layers.adv_prop import use_split
        >>> model = torch.nn.Sequential(SplitBatchNorm2d(3)).eval()
        >>> with use_split(model, 1):
        ...     logits = model(torch.randn(5, 3, 8, 8))
    """
    split = checks.integer("split", split, 0)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, SplitBatchNorm)}
    if not norms:
        raise ValueError(f"model: expected at least one split batch norm, got none in {type(model).__name__}")
    for name, norm in norms.items():
        if split >= norm.num_splits:
            raise ValueError(f"split: expected at most {norm.num_splits - 1}, the last of {name!r}, got {split}")
    with reopened(partial(_running, list(norms.values()), split, update_statistics)):
        yield


@contextmanager
def _running(norms: list[SplitBatchNorm], split: int, update_statistics: bool) -> Iterator[None]:
    before = [(norm, norm._split, norm._update_statistics) for norm in norms]
    try:
        for norm in norms:
            norm._split, norm._update_statistics = split, update_statistics
        yield
    finally:
        for norm, split_before, update_before in before:
            norm._split, norm._update_statistics = split_before, update_before
