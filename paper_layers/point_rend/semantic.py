"""PointRend for semantic segmentation: coarse logits, refined at uncertain points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers._core import checks, values
from paper_layers._core._torch_private import is_tracing
from paper_layers._core.fusing import forward_method
from paper_layers._core.tracing import Leaf
from paper_layers.ops.point_sample import point_sample
from paper_layers.ops.uncertain_points.samples import sample_uncertain_points
from paper_layers.point_rend._repr import options
from paper_layers.point_rend._subdivision import RefinementStep, Size, halvings, last, subdivide
from paper_layers.point_rend.head import PointRendHead


def _segmentation_loss(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return the mean cross-entropy of (N, K, ...) over labels that are not ignored, or 0; binary for one class."""
    counted = labels != ignore_index
    if logits.shape[1] == 1:
        one = F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")
        total = one.where(counted, 0).sum()
    else:
        total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / counted.sum().clamp(min=1)


class PointRendSemantic(Leaf):
    """Refine the coarse semantic logits of any network at their uncertain points.

    Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as Rendering", CVPR 2020, sections 3 and 5. In training
    points are drawn, most of them where the coarse logits are uncertain; their loss trains the point head, the coarse
    network and the features. In inference the map is enlarged step by step, at most twofold each time, and the point
    head predicts the `subdivision_num_points` most uncertain pixels of each map. Several feature maps are concatenated
    along channels; in inference the official code concatenates them along the batch. With one class the logits are
    binary, label 1 against 0.

    Args:
        in_channels: Channels of the fine feature maps, summed over maps.
        num_classes: Classes K, the channels of the coarse logits.
        hidden_features: See `PointRendHead`.
        num_fc: See `PointRendHead`.
        coarse_pred_each_layer: See `PointRendHead`.
        num_points: Points to train on in each image.
        oversample_ratio: See `paper_layers.sample_uncertain_points`.
        importance_sample_ratio: See `paper_layers.sample_uncertain_points`.
        subdivision_num_points: Pixels to predict in each map in inference.
        ignore_index: The label to ignore.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A number is out of range.

    Example:
        >>> import torch
        >>> from paper_layers.point_rend import PointRendSemantic
        >>> refine = PointRendSemantic(in_channels=256, num_classes=19)
        >>> features, coarse = torch.randn(2, 256, 32, 64), torch.randn(2, 19, 8, 16)
        >>> refine(features, coarse, size=(128, 256)).shape
        torch.Size([2, 19, 128, 256])
        >>> losses = refine(features, coarse, labels=torch.randint(19, (2, 128, 256)))
        >>> list(losses)
        ['loss_sem_seg', 'loss_sem_seg_point']
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        hidden_features: int = 256,
        num_fc: int = 3,
        coarse_pred_each_layer: bool = False,
        num_points: int = 2048,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        subdivision_num_points: int = 8192,
        ignore_index: int = 255,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_points = checks.integer("num_points", num_points, 1)
        subdivision_num_points = checks.integer("subdivision_num_points", subdivision_num_points, 1)
        self.num_points, self.subdivision_num_points = num_points, subdivision_num_points
        self.oversample_ratio, self.importance_sample_ratio = oversample_ratio, importance_sample_ratio
        self.ignore_index = ignore_index
        self.point_head = PointRendHead(
            in_channels,
            num_classes,
            hidden_features=hidden_features,
            num_fc=num_fc,
            coarse_pred_each_layer=coarse_pred_each_layer,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """Initialize the parameters as the official code does."""
        self.point_head.reset_parameters()

    def extra_repr(self) -> str:
        """Return the options that the point head does not show."""
        sampling = options(self, "num_points", "oversample_ratio", "importance_sample_ratio")
        return f"{sampling}, {options(self, 'subdivision_num_points', 'ignore_index')}"

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        coarse: Tensor,
        labels: Tensor | None = None,
        *,
        size: Size | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Refine the logits, or compute the losses if labels are given.

        Args:
            features: Maps of shape (N, C_l, h_l, w_l), one or a list, of any sizes.
            coarse: Logits of shape (N, num_classes, h, w).
            labels: Classes of shape (N, H, W), integers or bool: from 0 to K - 1, or `ignore_index`. With one
                class, 0 or 1: convert a mask of 0 and 255 by ``mask == 255``, as 255 would be ignored without an error.
            size: (height, width) of the refined map, required without labels. If it is not larger than the coarse map,
                the coarse map is interpolated and not refined.
            generator: Draws the points to train on; default torch's own.

        Returns:
            Logits of shape (N, num_classes, *size) in the dtype of `coarse`; or two losses: "loss_sem_seg" of the
            coarse logits, enlarged to the size of the labels, and "loss_sem_seg_point" of the points. They are zero if
            all labels are ignored.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: Shapes differ from the ones above, or a label is out of range. On CUDA a wrong label raises an
                error after the call.
        """
        if labels is None:
            if size is None:
                raise ValueError("size: expected (height, width) where there are no labels, got None")
            return last(self.steps(features, coarse, size))
        labels = self._checked(coarse, labels)
        point_loss = self._point_loss(features, coarse, labels, generator)
        full = F.interpolate(coarse, labels.shape[1:], mode="bilinear", align_corners=False)
        return {
            "loss_sem_seg": _segmentation_loss(full, labels, self.ignore_index),
            "loss_sem_seg_point": point_loss,
        }

    def steps(self, features: Tensor | Sequence[Tensor], coarse: Tensor, size: Size) -> Iterator[RefinementStep]:
        """Yield each map of the refinement, first the coarse map, last the map of this size."""
        self._check(coarse)
        if is_tracing():  # Tensors' sizes are tensors here; a trace is for one size.
            size = cast(Size, tuple(map(int, size)))
        height, width = checks.pair("size", size, 1)
        _, *sizes = halvings((height, width), (coarse.shape[2], coarse.shape[3]))
        if not sizes and (height, width) != coarse.shape[2:]:
            coarse = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        yield RefinementStep(coarse, None)
        yield from subdivide(
            coarse, sizes, self.subdivision_num_points, lambda points: self.predict(features, coarse, points)
        )

    @forward_method
    def point_loss(
        self,
        features: Tensor | Sequence[Tensor],
        coarse: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss at the points alone, for a host that computes the coarse loss; see `forward`."""
        return self._point_loss(features, coarse, self._checked(coarse, labels), generator)

    def _checked(self, coarse: Tensor, labels: Tensor) -> Tensor:
        """Return the labels as int64; refuse values out of range."""
        self._check(coarse)
        if isinstance(labels, Tensor) and labels.dtype == torch.bool:
            labels = labels.long()
        labels = values.integers("labels", labels, coarse.shape[0], "H", "W")
        checks.same_device("labels", labels, "coarse", coarse)
        return values.labels("labels", labels, max(2, self.point_head.num_classes), self.ignore_index)

    def _point_loss(
        self,
        features: Tensor | Sequence[Tensor],
        coarse: Tensor,
        labels: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        points = self.draw(coarse, generator=generator)
        known = labels.where(labels != self.ignore_index, -1)  # float32 holds all classes, but not every ignore_index.
        labels = point_sample(known[:, None].to(torch.float32), points, mode="nearest")[:, 0].long()
        return _segmentation_loss(self.predict(features, coarse, points), labels, -1)

    def draw(self, coarse: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw points (N, num_points, 2) to train on, most of them where the coarse logits are uncertain."""
        return sample_uncertain_points(
            coarse,
            self.num_points,
            oversample_ratio=self.oversample_ratio,
            importance_sample_ratio=self.importance_sample_ratio,
            generator=generator,
        )

    @forward_method
    def predict(self, features: Tensor | Sequence[Tensor], coarse: Tensor, points: Tensor) -> Tensor:
        """Return the point head's logits (N, num_classes, P) at points (N, P, 2)."""
        return self.point_head(point_sample(features, points), point_sample(coarse, points))

    def _check(self, coarse: Tensor) -> None:
        checks.floating("coarse", coarse)
        classes = self.point_head.num_classes
        checks.shape("coarse", coarse, ("N", classes, "h", "w"))
        if 0 in coarse.shape[2:]:
            raise ValueError(f"coarse: expected shape (N, {classes}, h, w) with pixels, got {tuple(coarse.shape)}")
