"""Split norms of timm's classes; importing this imports timm."""

from __future__ import annotations

from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn

from paper_layers.adv_prop.norm import SplitBatchNorm, SplitBatchNorm2d
from paper_layers.adv_prop.sync import SplitSyncBatchNorm


class _Activated(SplitBatchNorm):
    """Apply the dropout and the activation of timm's fused norms after the norm."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Apply the norm, dropout and activation."""
        return self.act(self.drop(super().forward(input)))


class SplitBatchNormAct2d(_Activated, SplitBatchNorm2d, BatchNormAct2d):
    """timm's BatchNormAct2d, split."""


class SplitSyncBatchNormAct(_Activated, SplitSyncBatchNorm, BatchNormAct2d):
    """timm's SyncBatchNormAct, split."""


SPLIT: dict[type[nn.Module], type[SplitBatchNorm]] = {
    BatchNormAct2d: SplitBatchNormAct2d,
    SyncBatchNormAct: SplitSyncBatchNormAct,
}
