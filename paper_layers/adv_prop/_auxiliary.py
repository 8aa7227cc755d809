"""The auxiliary norms that a split batch norm holds under `aux_bn`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from paper_layers._core._torch_private import BatchNorm
from paper_layers._core.fusing import known

if TYPE_CHECKING:
    from paper_layers.adv_prop.norm import SplitBatchNorm

TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class AuxiliaryNorm(BatchNorm):
    """Parameters and statistics of one auxiliary split, which its SplitBatchNorm computes with.

    The classes for 1, 2 and 3 dimensions are torch's batch norms, so that loops over modules find them.
    """

    _owner: tuple[SplitBatchNorm, ...] = ()  # Set while it runs; a tuple, so that it is not a submodule.

    def forward(self, input: Tensor) -> Tensor:
        """Normalize by the owner's eps, momentum and mode; refuse any other caller."""
        for owner in self._owner:
            return owner.normalize(input, [self])
        raise RuntimeError("aux_bn: expected to be run by its SplitBatchNorm, as in `with use_split(model, 1)`")

    def reset_running_stats(self) -> None:
        """Do nothing: only the owner knows whether the images after a reset come to this split."""

    def forget(self) -> None:
        """Reset the running statistics."""
        super().reset_running_stats()

    def reset_parameters(self) -> None:
        """Initialize afresh."""
        super().reset_parameters()
        self.forget()

    def extra_repr(self) -> str:
        """Return the number of features; the owner shows the rest."""
        return str(self.num_features)


class AuxiliaryNorm1d(AuxiliaryNorm, nn.BatchNorm1d):
    """An auxiliary norm of a `SplitBatchNorm1d`."""


class AuxiliaryNorm2d(AuxiliaryNorm, nn.BatchNorm2d):
    """An auxiliary norm of a `SplitBatchNorm2d`."""


class AuxiliaryNorm3d(AuxiliaryNorm, nn.BatchNorm3d):
    """An auxiliary norm of a `SplitBatchNorm3d`."""


known(AuxiliaryNorm, AuxiliaryNorm1d, AuxiliaryNorm2d, AuxiliaryNorm3d)


class AuxiliaryNorms(nn.ModuleList):
    """The auxiliary norms of one split batch norm."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Refuse any other module, such as one that a conversion of models puts here: it would not run."""
        self._check(name, module)
        super().add_module(name, module)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse any other module, as `add_module` does."""
        if isinstance(value, nn.Module):
            self._check(name, value)
        super().__setattr__(name, value)

    def _check(self, name: str, module: nn.Module | None) -> None:
        if not isinstance(module, AuxiliaryNorm):
            raise TypeError(
                f"aux_bn.{name}: expected an AuxiliaryNorm, got {type(module).__name__}. A conversion of batch norms, "
                "such as nn.SyncBatchNorm.convert_sync_batchnorm, would lose the split: convert the model first, "
                "and then split its norms"
            )
