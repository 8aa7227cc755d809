"""Turn batch norms into split ones, for training with AdvProp, and back into plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from paper_layers._core._torch_private import BatchNorm
from paper_layers._core.checks import integer
from paper_layers._core.surgery import Filter, M, check_names, format_path, matching_modules
from paper_layers.adv_prop._auxiliary import TENSORS, AuxiliaryNorm
from paper_layers.adv_prop.norm import SplitBatchNorm, SplitBatchNorm1d, SplitBatchNorm2d, SplitBatchNorm3d
from paper_layers.adv_prop.sync import SplitSyncBatchNorm

_SPLIT: dict[type[nn.Module], type[SplitBatchNorm]] = {
    nn.BatchNorm1d: SplitBatchNorm1d,
    nn.BatchNorm2d: SplitBatchNorm2d,
    nn.BatchNorm3d: SplitBatchNorm3d,
    nn.SyncBatchNorm: SplitSyncBatchNorm,
}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {split: plain for plain, split in _SPLIT.items()}


def split_batch_norm(
    model: M,
    num_splits: int = 2,
    *,
    split_sizes: Sequence[int] | Sequence[float] | None = None,
    filter_fn: Filter | None = None,
) -> M:
    """Turn every batch norm of a finished model into a split one, for training with AdvProp.

    The auxiliary batch norm of Xie, Tan, Gong, Wang, Yuille, Le, "Adversarial Examples Improve Image Recognition",
    CVPR 2020, section 4.2; see `paper_layers.SplitBatchNorm2d`. Each norm becomes the main norm: its parameters and
    statistics stay the same objects under the same keys. Each auxiliary norm starts as a copy, under ``aux_bn.0.`` and
    so on, with the same device, dtype and `requires_grad`: give its parameters to the optimizer.

    Splits `nn.BatchNorm1d`, `2d`, `3d`, `nn.SyncBatchNorm` (each split is then synchronized by itself), and timm's
    `BatchNormAct2d` and `SyncBatchNormAct`, which keep their dropout and activation. Other norms (`FrozenBatchNorm2d`,
    `nn.GroupNorm`) are left alone. To split and synchronize, convert to SyncBatchNorm first: converting split norms is
    an error.

    Args:
        model: Any module; changed in place.
        num_splits: Number of splits, at least 2.
        split_sizes: Sizes of a training batch's splits, see `SplitBatchNorm2d`; default equal.
        filter_fn: ``filter_fn(module, name) -> bool``, which norms to split; default all.

    Returns:
        `model`; unchanged if its norms are already split this way and `filter_fn` accepts no further norm.

    Raises:
        TypeError: `model` is not a module, or an argument has the wrong type.
        ValueError: Nothing to split; a batch norm of an unknown class, which may compute something else; a norm that is
            split in another way already; a pruned norm; `num_splits` and `split_sizes` do not match.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers import swap
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        >>> weight = model[1].weight
        >>> swap.split_batch_norm(model)[1]  # doctest: +ELLIPSIS
        SplitBatchNorm2d(
          16, ..., num_splits=2
          (aux_bn): AuxiliaryNorms(
            (0): AuxiliaryNorm2d(16)
          )
        )
        >>> model[1].weight is weight
        True
    """
    setting = SplitBatchNorm1d(
        1, num_splits=num_splits, split_sizes=split_sizes, device="meta"
    )  # Checks the arguments.
    wanted = (setting.num_splits, setting.split_sizes)

    def fits(module: nn.Module) -> bool:
        return isinstance(module, BatchNorm) and not isinstance(module, SplitBatchNorm | AuxiliaryNorm)

    norms = matching_modules(model, "batch norm", fits, lambda module: isinstance(module, SplitBatchNorm), filter_fn)
    for name, module in model.named_modules():
        if isinstance(module, SplitBatchNorm) and (filter_fn is None or filter_fn(module, name)):
            found = (module.num_splits, module.split_sizes)
            if found != wanted:
                raise ValueError(
                    f"{format_path(name)}: expected num_splits={found[0]} and split_sizes={found[1]}, "
                    f"as it is already split, got {wanted[0]} and {wanted[1]}"
                )
    kinds: list[type[SplitBatchNorm]] = []
    for norm, name in norms.items():
        if isinstance(norm, BatchNorm) and hasattr(norm, "aux_bn"):
            raise ValueError(
                f"{format_path(name)}: expected a norm that is not split, got {type(norm).__name__} of another "
                "package; split the norms of the plain model, and load its state dict, which has the same keys"
            )
        kind = _split_class(type(norm))
        if kind is None:
            raise ValueError(
                f"{format_path(name)}: expected a batch norm of torch's or timm's own classes, got "
                f"{type(norm).__name__}, which may compute something else; filter_fn can leave it out"
            )
        check_names(norm, name, kind, ["num_splits", "split_sizes"])
        _check_stored(norm, name)
        kinds.append(kind)
    for (norm, name), kind in zip(norms.items(), kinds, strict=True):
        auxiliaries = kind.new_auxiliaries(norm, num_splits, device="meta")
        for auxiliary in auxiliaries:
            _copy_tensors(norm, auxiliary)
        norm.__class__ = kind
        norm.num_splits, norm.split_sizes, norm.aux_bn = setting.num_splits, setting.split_sizes, auxiliaries
        norm._name_in_model = format_path(name)
        auxiliaries.train(norm.training)
    return model


def plain_batch_norm(model: M, split: int = 0, *, filter_fn: Filter | None = None) -> M:
    """Turn every split batch norm into a plain one that keeps one split: for inference, or an export.

    The inverse of `split_batch_norm`, also for norms that were built as split ones. The `Parameter` objects of the
    split stay; the keys are those of a plain norm.

    Args:
        model: Any module; changed in place.
        split: The split to keep: 0 for the main norm, 1 for the first auxiliary norm, and so on.
        filter_fn: ``filter_fn(module, name) -> bool``, which norms; default all.

    Returns:
        `model`; unchanged if its norms are plain.

    Raises:
        TypeError: `model` is not a module, or `split` is not an int.
        ValueError: The model does not have a batch norm; a norm has too few splits; a split norm of an unknown class;
            a pruned norm, if `split` is not 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paper_layers import SplitBatchNorm2d, swap
        >>> swap.plain_batch_norm(nn.Sequential(SplitBatchNorm2d(16)))  # doctest: +ELLIPSIS
        Sequential(
          (0): BatchNorm2d(16, ...)
        )
    """
    integer("split", split, 0)
    plain = (*_SPLIT, SplitBatchNorm)

    def done(module: nn.Module) -> bool:
        return isinstance(module, plain) and not isinstance(module, SplitBatchNorm)

    norms = matching_modules(
        model, "split batch norm", lambda module: isinstance(module, SplitBatchNorm), done, filter_fn
    )
    for norm, name in norms.items():
        if split >= norm.num_splits:
            raise ValueError(
                f"split: expected at most {norm.num_splits - 1}, the last of {format_path(name)}, got {split}"
            )
        if _plain_class(type(norm)) is None:
            raise ValueError(
                f"{format_path(name)}: expected a split norm of this package's classes, got {type(norm).__name__}; "
                "filter_fn can leave it out"
            )
        if split:
            for one in (norm, norm.split_norms[split]):
                _check_stored(one, name)
    for norm in norms:
        kept = norm.split_norms[split]
        norm._parameters.update(kept._parameters)
        norm._buffers.update(kept._buffers)
        norm.__class__ = _plain_class(type(norm))
        del norm.aux_bn, norm.num_splits, norm.split_sizes
        for private in ("_name_in_model", "_split", "_update_statistics"):
            vars(norm).pop(private, None)
    return model


def _split_class(kind: type[nn.Module]) -> type[SplitBatchNorm] | None:
    return _split_of_timm().get(kind) if kind.__module__.startswith("timm.") else _SPLIT.get(kind)


def _plain_class(kind: Any) -> type[nn.Module] | None:
    if kind not in _PLAIN and kind.__module__ == f"{__package__}._timm":
        return {split: plain for plain, split in _split_of_timm().items()}.get(kind)
    return _PLAIN.get(kind)


def _split_of_timm() -> dict[type[nn.Module], type[SplitBatchNorm]]:
    from paper_layers.adv_prop._timm import SPLIT  # Only for a module of timm's: timm may not be installed.

    return SPLIT


def _check_stored(norm: nn.Module, name: str) -> None:
    """Refuse a norm with a tensor that hooks compute before each forward, as pruning does."""
    for tensor in TENSORS:
        if tensor in vars(norm):
            raise ValueError(
                f"{format_path(name)}: expected {tensor} to be a parameter or a buffer, got one that hooks compute; "
                "make pruning permanent with torch.nn.utils.prune.remove, or prune after the swap"
            )


def _copy_tensors(norm: nn.Module, auxiliary: nn.Module) -> None:
    """Copy the tensors that every batch norm has, but none that a user has added."""
    for name in auxiliary._parameters:
        parameter = norm._parameters.get(name)
        copied = None if parameter is None else nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        auxiliary._parameters[name] = copied
    for name in auxiliary._buffers:
        buffer = norm._buffers.get(name)
        auxiliary._buffers[name] = None if buffer is None else buffer.detach().clone()
