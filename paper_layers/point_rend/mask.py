"""PointRend for instance segmentation: masks of boxes, refined from fine features."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paper_layers._core.fusing import forward_method, readable
from paper_layers.ops.point_sample import point_sample
from paper_layers.ops.uncertain_points.samples import sample_uncertain_points
from paper_layers.point_rend.boxes import BoxMasks, Sampler
from paper_layers.point_rend.coarse import CoarseMaskHead
from paper_layers.point_rend.head import PointRendHead
from paper_layers.point_rend.targets import Boxes, cell_labels, mask_loss


class PointRendMask(BoxMasks):
    """Predict the masks of boxes: a coarse one, refined at its uncertain points; the losses and the inference.

    Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as Rendering", CVPR 2020, sections 3 and 4. In inference
    the point head predicts a regular grid of each box, of `init_resolution`, or of twice that as long as the next map
    has no more than `subdivision_num_points` pixels, and then the least sure points of each larger map. Only the map of
    the box's own class is kept and only its logit is computed. Where points outnumber the features' pixels, the first
    layer's product is taken on the features and sampled, and the coarse logits' products always are: these are
    linear, and give the same masks up to rounding.

    The losses are "loss_mask", of the coarse masks, whose pixels belong to the true mask where it covers half of them,
    as RoIAlign measures it, and "loss_mask_point".

    Args:
        in_channels: Channels of the feature maps, all together.
        num_classes: Classes K of the coarse head, and of the point head unless `class_agnostic`.
        spatial_scale: Pixels of a map for each pixel of the image: one number or one for each map.
        class_agnostic: Whether the point head has one mask for all classes.
        coarse_pred_each_layer: As in `PointRendHead`.
        fc_dim: As in `PointRendHead`.
        num_fc: As in `PointRendHead`.
        coarse_conv_dim: `conv_dim` of `CoarseMaskHead`.
        coarse_fc_dim: `fc_dim` of `CoarseMaskHead`.
        num_points: Points of each box to train on.
        oversample_ratio: As in `paper_layers.sample_uncertain_points`.
        importance_sample_ratio: As in `paper_layers.sample_uncertain_points`.
        init_resolution: Side of the first grid in inference, at most.
        subdivision_num_points: Points of each map to predict in inference.
        device: Where the parameters are.
        dtype: Their dtype.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or numbers do not fit.

    Example:
        >>> import torch
        >>> from paper_layers.point_rend import PointRendMask
        >>> head = PointRendMask(in_channels=64, num_classes=80, spatial_scale=1 / 4)
        >>> features, boxes = torch.randn(1, 64, 50, 76), [torch.tensor([[10.0, 20.0, 200.0, 180.0]])]
        >>> head(features, boxes, labels=[torch.tensor([17])], size=224).shape
        torch.Size([1, 1, 224, 224])
        >>> losses = head(features, boxes, labels=[torch.tensor([17])], masks=[torch.ones(1, 200, 304)])
        >>> list(losses)
        ['loss_mask', 'loss_mask_point']
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        spatial_scale: float | Sequence[float] = 0.25,
        class_agnostic: bool = False,
        coarse_pred_each_layer: bool = True,
        fc_dim: int = 256,
        num_fc: int = 3,
        coarse_conv_dim: int = 256,
        coarse_fc_dim: int = 1024,
        num_points: int = 14 * 14,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        init_resolution: int = 7,
        subdivision_num_points: int = 28 * 28,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(spatial_scale, num_points, subdivision_num_points, init_resolution)
        self.oversample_ratio, self.importance_sample_ratio = oversample_ratio, importance_sample_ratio
        self.coarse_head = CoarseMaskHead(
            in_channels, num_classes, coarse_conv_dim, coarse_fc_dim, device=device, dtype=dtype
        )
        self.point_head = PointRendHead(
            in_channels, num_classes, fc_dim, num_fc, coarse_pred_each_layer, class_agnostic, device, dtype
        )

    def reset_parameters(self) -> None:
        """Start again, as in the official code."""
        self.coarse_head.reset_parameters()
        self.point_head.reset_parameters()

    def extra_repr(self) -> str:
        """What the heads do not show."""
        return (
            f"spatial_scale={self.spatial_scale}, num_points={self.num_points}, "
            f"oversample_ratio={self.oversample_ratio}, importance_sample_ratio={self.importance_sample_ratio}, "
            f"init_resolution={self.init_resolution}, subdivision_num_points={self.subdivision_num_points}"
        )

    @property
    def num_classes(self) -> int:
        """Classes K."""
        return self.coarse_head.num_classes

    @forward_method
    def coarse(self, features: Tensor | Sequence[Tensor], boxes: Boxes) -> Tensor:
        """The coarse logits (R, num_classes, 7, 7) of the boxes, from the features on a regular grid in each."""
        return self._look(self.coarse_head, features, boxes)

    @property
    def _coarse_shape(self) -> tuple[int | str, ...]:
        return self.coarse_head.num_classes, "h", "w"

    def _draw(self, coarse: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        return sample_uncertain_points(
            coarse,
            self.num_points,
            labels=labels,
            oversample_ratio=self.oversample_ratio,
            importance_sample_ratio=self.importance_sample_ratio,
            generator=generator,
        )

    def _logits(self, coarse: Tensor, fine: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        return self.point_head(fine, point_sample(coarse, points), labels)

    def _losses(
        self,
        coarse: Tensor,
        labels: Tensor,
        masks: Sequence[Tensor],
        boxes: Sequence[Tensor],
        matched: Sequence[Tensor] | None,
    ) -> dict[str, Tensor]:
        own = coarse[torch.arange(labels.shape[0], device=labels.device), labels]
        return {"loss_mask": mask_loss(own, cell_labels(masks, self.coarse_head.side, boxes, matched))}

    @property
    def _splits(self) -> bool:
        """Return whether the point head's products may be taken on maps, in place of a call of the head at points."""
        return readable(self.point_head, PointRendHead) and self.point_head.splits

    def _fine(self, features: Tensor | Sequence[Tensor], count: int) -> Sampler:
        """The features' share of the first layer at points: the product before or after sampling, which is smaller."""
        if not self._splits:
            return super()._fine(features, count)
        maps = [features] if isinstance(features, Tensor) else list(features)
        head = self.point_head
        sample = functools.partial(point_sample, spatial_scale=self.spatial_scale)
        # What is exported may be for any number of boxes.
        if torch.compiler.is_exporting() or sum(m.shape[0] * m.shape[2] * m.shape[3] for m in maps) > count:
            return lambda points, rois: head.fine_shares([sample(maps, points, boxes=rois)])[0]
        shares = head.fine_shares(maps)
        return lambda points, rois: functools.reduce(
            torch.add, sample(shares, points, boxes=rois).chunk(len(shares), 1)
        )

    def _predictor(self, coarse: Tensor, rois: Tensor, labels: Tensor, fine: Sampler) -> Callable[[Tensor], Tensor]:
        if not self._splits:
            return super()._predictor(coarse, rois, labels, fine)
        head = self.point_head
        shares = list(head.coarse_shares(coarse, labels))
        return lambda points: head.finish(fine(points, rois), (point_sample(share, points) for share in shares), labels)
