"""Run one branch of a model's split batch norms on whole batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from paper_layers._core import checks
from paper_layers._core.recompute import reopened
from paper_layers.adv_prop.norm import SplitBatchNorm


@contextmanager
def branch(model: nn.Module, index: int, *, update_statistics: bool = True) -> Iterator[None]:
    """Let every split batch norm in a model run one branch on the whole batch.

    In eval with the branch's running statistics: to attack the auxiliary branch as in Xie et al., "Adversarial Examples
    Improve Image Recognition", CVPR 2020, or to measure accuracy through it. In training with those of the batch.
    Reading a norm's weight, bias and statistics gives the branch's, as tools do that fold norms into convolutions.
    Everything is as before afterwards; contexts nest, the inner one wins. Forwards that `torch.utils.checkpoint`
    recomputes run the branch that they ran at first, also in a backward outside of the context. The backward of a
    checkpointed forward without a branch must be outside.

    Args:
        model: A model with split batch norms.
        index: 0 for the main norm, 1 for the first auxiliary one, and so on.
        update_statistics: Whether batches in training move the branch's running statistics.

    Raises:
        TypeError: `index` is not an int.
        ValueError: The model has no split batch norm, or one without that branch.

    Example:
        >>> import torch
        >>> from paper_layers import SplitBatchNorm2d
        >>> from paper_layers.adv_prop import branch
        >>> model = torch.nn.Sequential(SplitBatchNorm2d(3)).eval()
        >>> with branch(model, 1):
        ...     logits = model(torch.randn(5, 3, 8, 8))
    """
    index = checks.integer("index", index, 0)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, SplitBatchNorm)}
    if not norms:
        raise ValueError(f"model: expected at least one split batch norm, got none in {type(model).__name__}")
    for name, norm in norms.items():
        if index >= norm.num_splits:
            raise ValueError(f"index: expected at most {norm.num_splits - 1}, the last branch of {name!r}, got {index}")
    with reopened(partial(_running, list(norms.values()), index, update_statistics)):
        yield


@contextmanager
def _running(norms: list[SplitBatchNorm], index: int, update_statistics: bool) -> Iterator[None]:
    before = [(norm, norm._branch, norm._update_statistics) for norm in norms]
    try:
        for norm in norms:
            norm._branch, norm._update_statistics = index, update_statistics
        yield
    finally:
        for norm, index_before, update_before in before:
            norm._branch, norm._update_statistics = index_before, update_before
