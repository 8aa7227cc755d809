"""PointRend for instance segmentation: masks of boxes, refined from fine features."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from paper_layers.ops import _checks
from paper_layers.ops.point_sample import point_sample
from paper_layers.ops.sample_uncertain_points import sample_uncertain_points
from paper_layers.point_rend.coarse import CoarseMaskHead
from paper_layers.point_rend.head import PointRendHead
from paper_layers.point_rend.subdivision import Size, Step, grid_sizes, last, regular_grid, subdivide
from paper_layers.point_rend.targets import Boxes, cell_labels, mask_loss, rows, sample_masks

Sampler = Callable[[Tensor, Tensor], Tensor]  # From points (R, P, 2) in boxes (R, 5).

# Points that are predicted at once in inference. With the usual widths each tensor of them has 3 MB: it stays in the
# cache, and far below the 32 MB from where glibc maps new pages for each tensor.
_CHUNK = 4 * 28 * 28


class PointRendMask(nn.Module):
    """Predict the masks of boxes: a coarse one, refined at its uncertain points; the losses and the inference.

    Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as Rendering", CVPR 2020, sections 3 and 4. In inference
    the point head predicts a regular grid of each box, of `init_resolution`, or of twice that as long as the next map
    has no more than `subdivision_num_points` pixels, and then the least sure points of each larger map. Only the map of
    the box's own class is kept and only its logit is computed. Where points outnumber the features' pixels, the first
    layer's product is taken on the features and sampled, and the coarse logits' products always are: these are
    linear, and give the same masks up to rounding.

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
        super().__init__()
        numbers = {"num_points": num_points, "init_resolution": init_resolution}
        for name, value in {**numbers, "subdivision_num_points": subdivision_num_points}.items():
            _checks.integer(name, value, 1)
        self.spatial_scale = spatial_scale
        self.num_points, self.init_resolution = num_points, init_resolution
        self.oversample_ratio, self.importance_sample_ratio = oversample_ratio, importance_sample_ratio
        self.subdivision_num_points = subdivision_num_points
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

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        boxes: Boxes,
        labels: Tensor | Sequence[Tensor],
        masks: Sequence[Tensor] | None = None,
        *,
        matched: Sequence[Tensor] | None = None,
        size: int = 224,
        generator: torch.Generator | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Predict the masks of the boxes, or compute the losses where there are true masks.

        Args:
            features: Maps of shape (N, C_l, H_l, W_l), one or a list.
            boxes: Corners (x1, y1, x2, y2) in pixels of the image, a tensor (R_i, 4) for each image; without masks also
                (R, 5) with the image's number first.
            labels: The class of each box, int64: a tensor (R_i,) for each image, or one (R,) of all.
            masks: The true masks of each image, (M_i, H_i, W_i) of any dtype at the size of the image, values from 0
                to 1; -1 is a pixel that does not count.
            matched: For each image the number of each box's mask, int64 (R_i,); default the box's own number.
            size: Side of the masks in pixels; any.
            generator: What the points to train on are drawn from; default torch's own.

        Returns:
            Logits of the boxes' own classes, of shape (R, 1, size, size); or two losses: "loss_mask", of the coarse
            masks, whose pixels belong to the true mask where it covers half of them (of 4x4 samples), and
            "loss_mask_point". They are zero where there are no boxes.
        """
        coarse = self.coarse(features, boxes)
        if masks is None:
            return self.refine(coarse, features, boxes, labels, size)
        if isinstance(boxes, Tensor):
            raise ValueError("boxes: expected a tensor for each image where there are masks, got one for all")
        rois, classes = rows(boxes, labels, coarse.device)
        points = sample_uncertain_points(
            coarse,
            self.num_points,
            labels=classes,
            oversample_ratio=self.oversample_ratio,
            importance_sample_ratio=self.importance_sample_ratio,
            generator=generator,
        )
        fine = point_sample(features, points, boxes=rois, spatial_scale=self.spatial_scale)
        logits = self.point_head(fine, point_sample(coarse, points), classes)[:, 0]
        own = coarse[torch.arange(classes.shape[0], device=classes.device), classes]
        return {
            "loss_mask": mask_loss(own, cell_labels(masks, self.coarse_head.side, boxes, matched)),
            "loss_mask_point": mask_loss(logits, sample_masks(masks, points, boxes, matched)),
        }

    def coarse(self, features: Tensor | Sequence[Tensor], boxes: Boxes) -> Tensor:
        """The coarse logits (R, num_classes, 7, 7) of the boxes, from the features on a regular grid in each."""
        count = boxes.shape[0] if isinstance(boxes, Tensor) else sum(box.shape[0] for box in boxes)
        side = 2 * self.coarse_head.side
        first = features if isinstance(features, Tensor) else features[0]
        grid = regular_grid(count, (side, side), first.device)
        return self.coarse_head(point_sample(features, grid, boxes=boxes, spatial_scale=self.spatial_scale))

    def refine(
        self,
        coarse: Tensor,
        features: Tensor | Sequence[Tensor],
        boxes: Boxes,
        labels: Tensor | Sequence[Tensor],
        size: int = 224,
    ) -> Tensor:
        """The masks (R, 1, size, size) from coarse logits (R, num_classes, h, w); a few boxes at a time."""
        rois, classes, sizes, fine = self._prepare(coarse, features, boxes, labels, size)
        count = max(1, _CHUNK // max(self._points(sizes)))
        # A compiler arranges the memory itself, and should not unroll a loop over boxes.
        if torch.compiler.is_compiling() or rois.shape[0] <= count:
            return last(self._steps(coarse, rois, classes, sizes, fine))
        masks = coarse.new_empty(0)
        for first in range(0, rois.shape[0], count):
            some = slice(first, first + count)
            logits = last(self._steps(coarse[some], rois[some], classes[some], sizes, fine))
            if first == 0:
                masks = logits.new_empty(rois.shape[0], *logits.shape[1:])
            masks[some] = logits
        return masks

    def steps(
        self,
        coarse: Tensor,
        features: Tensor | Sequence[Tensor],
        boxes: Boxes,
        labels: Tensor | Sequence[Tensor],
        size: int = 224,
    ) -> Iterator[Step]:
        """The refinement step by step, as `refine` does it, of all boxes at once: first the regular grid's map."""
        return self._steps(coarse, *self._prepare(coarse, features, boxes, labels, size))

    def _prepare(
        self,
        coarse: Tensor,
        features: Tensor | Sequence[Tensor],
        boxes: Boxes,
        labels: Tensor | Sequence[Tensor],
        size: int,
    ) -> tuple[Tensor, Tensor, list[Size], Sampler]:
        _checks.integer("size", size, 1)
        rois, classes = rows(boxes, labels, coarse.device)
        if coarse.dim() != 4 or coarse.shape[:2] != (rois.shape[0], self.coarse_head.num_classes):
            expected = f"({rois.shape[0]}, {self.coarse_head.num_classes}, h, w)"
            raise ValueError(f"coarse: expected shape {expected}, got {tuple(coarse.shape)}")
        sizes = grid_sizes(size, self.init_resolution, self.subdivision_num_points)
        return rois, classes, sizes, self._fine(features, rois.shape[0] * sum(self._points(sizes)))

    def _points(self, sizes: list[Size]) -> list[int]:
        """How many points of each map are predicted."""
        first, *rest = (height * width for height, width in sizes)
        return [first, *(min(pixels, self.subdivision_num_points) for pixels in rest)]

    def _fine(self, features: Tensor | Sequence[Tensor], count: int) -> Sampler:
        """The features' share of the first layer at points: the product before or after sampling, which is smaller."""
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

    def _steps(self, coarse: Tensor, rois: Tensor, labels: Tensor, sizes: list[Size], fine: Sampler) -> Iterator[Step]:
        head = self.point_head
        shares = list(head.coarse_shares(coarse, labels))

        def predict(points: Tensor) -> Tensor:
            return head.finish(fine(points, rois), (point_sample(share, points) for share in shares), labels)

        points = regular_grid(rois.shape[0], sizes[0], coarse.device).flatten(1, 2)
        logits = predict(points).unflatten(2, sizes[0])
        yield Step(logits, points)
        yield from subdivide(logits, sizes[1:], self.subdivision_num_points, predict)
