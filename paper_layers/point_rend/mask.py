"""PointRend for instance segmentation: coarse masks of boxes, refined at uncertain points."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from paper_layers._core import checks
from paper_layers._core.fusing import forward_method, readable, within
from paper_layers._core.tracing import Leaf
from paper_layers.ops.point_sample import point_sample
from paper_layers.ops.uncertain_points.samples import sample_uncertain_points
from paper_layers.point_rend import _boxes
from paper_layers.point_rend._boxes import Boxes, Features, Labels, Predict, Refinement
from paper_layers.point_rend._repr import options
from paper_layers.point_rend._subdivision import RefinementStep, grid_sizes
from paper_layers.point_rend._targets import cell_labels, mask_loss, sample_masks
from paper_layers.point_rend.coarse import CoarseMaskHead
from paper_layers.point_rend.head import PointRendHead


class PointRendMask(Leaf):
    """Predict masks of boxes: coarse ones, refined at their uncertain points.

    Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as Rendering", CVPR 2020, sections 3 and 4. In inference
    the point head first predicts a regular grid of points in each box. The grid has side `init_resolution`, doubled as
    long as the next grid has at most `subdivision_num_points` points. Then each map is enlarged to twice its side, and
    its `subdivision_num_points` most uncertain points are predicted again. Only the logit of the box's own class is
    computed. The point head's partial products are computed on maps and sampled where that is cheaper; this changes
    the masks by rounding only.

    The losses are "loss_mask" for the coarse masks and "loss_mask_point" for the points. The label of a coarse pixel is
    1 where the true mask covers at least half of it, as measured by RoIAlign.

    Args:
        in_channels: Channels of the feature maps, summed over maps.
        num_classes: Classes K.
        spatial_scale: Pixels of a map for each pixel of the image: one number or one for each map.
        class_agnostic: If True, the point head predicts one mask for all classes.
        coarse_pred_each_layer: See `PointRendHead`.
        hidden_features: See `PointRendHead`.
        num_fc: See `PointRendHead`.
        coarse_hidden_channels: `hidden_channels` of `CoarseMaskHead`.
        coarse_hidden_features: `hidden_features` of `CoarseMaskHead`.
        num_points: Points to train on in each box.
        oversample_ratio: See `paper_layers.sample_uncertain_points`.
        importance_sample_ratio: See `paper_layers.sample_uncertain_points`.
        init_resolution: Side of the first grid in inference, before it is doubled.
        subdivision_num_points: Points to predict in each map in inference.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A number is out of range.

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
        *,
        spatial_scale: float | Sequence[float] = 0.25,
        class_agnostic: bool = False,
        coarse_pred_each_layer: bool = True,
        hidden_features: int = 256,
        num_fc: int = 3,
        coarse_hidden_channels: int = 256,
        coarse_hidden_features: int = 1024,
        num_points: int = 14 * 14,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        init_resolution: int = 7,
        subdivision_num_points: int = 28 * 28,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.spatial_scale = spatial_scale
        self.num_points, self.init_resolution, self.subdivision_num_points = checks.positive(
            num_points=num_points, init_resolution=init_resolution, subdivision_num_points=subdivision_num_points
        )
        self.oversample_ratio, self.importance_sample_ratio = oversample_ratio, importance_sample_ratio
        self.coarse_head = CoarseMaskHead(
            in_channels,
            num_classes,
            hidden_channels=coarse_hidden_channels,
            hidden_features=coarse_hidden_features,
            device=device,
            dtype=dtype,
        )
        self.point_head = PointRendHead(
            in_channels,
            num_classes,
            hidden_features=hidden_features,
            num_fc=num_fc,
            coarse_pred_each_layer=coarse_pred_each_layer,
            class_agnostic=class_agnostic,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """Initialize the parameters as the official code does."""
        self.coarse_head.reset_parameters()
        self.point_head.reset_parameters()

    def extra_repr(self) -> str:
        """Return the options that the heads do not show."""
        sampling = options(self, "num_points", "oversample_ratio", "importance_sample_ratio")
        inference = options(self, "init_resolution", "subdivision_num_points")
        return f"spatial_scale={self.spatial_scale}, {sampling}, {inference}"

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self.coarse_head.num_classes

    def forward(
        self,
        features: Features,
        boxes: Boxes,
        labels: Labels,
        masks: Sequence[Tensor] | None = None,
        *,
        matched: Sequence[Tensor] | None = None,
        size: int = 224,
        generator: torch.Generator | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Predict the masks of the boxes, or compute the losses if true masks are given.

        Args:
            features: Maps of shape (N, C_l, H_l, W_l), one or a list.
            boxes: Corners (x1, y1, x2, y2) in pixels of the image, a tensor (R_i, 4) for each image; without masks also
                (R, 5) with the image's number first.
            labels: The class of each box, integers from 0 to K - 1: a tensor (R_i,) for each image, or one (R,).
            masks: The true masks of each image, (M_i, H_i, W_i) of any dtype at the size of the image, with values from
                0 to 1, or -1 where a pixel does not count. Divide masks of 0 and 255 by 255.
            matched: Integers (R_i,) for each image, the index of each box's mask; default the box's own index.
            size: Side of the masks in pixels.
            generator: Draws the points to train on; default torch's own.

        Returns:
            Logits of the boxes' own classes, of shape (R, 1, size, size); or two losses by name, which are zero
            without boxes.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: Shapes differ from the ones above; a label, a mask's value or index is out of range; a box to
                train on is not finite. On CUDA wrong values raise an error after the call, as a wrong index does.
        """
        coarse = within(self, "coarse")(features, boxes)
        if masks is None:
            return within(self, "refine")(features, coarse, boxes, labels, size=size)
        if isinstance(boxes, Tensor):
            raise ValueError("boxes: expected a tensor for each image where there are masks, got one for all")
        rois, classes = _boxes.flatten(boxes, labels, self.num_classes, coarse.device)
        rois = _boxes.finite(rois)
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

    @forward_method
    def coarse(self, features: Features, boxes: Boxes) -> Tensor:
        """Predict the coarse logits (R, num_classes, 7, 7) of the boxes."""
        return self.coarse_head(_boxes.grid_features(features, boxes, 2 * self.coarse_head.side, self.spatial_scale))

    @forward_method
    def refine(self, features: Features, coarse: Tensor, boxes: Boxes, labels: Labels, *, size: int = 224) -> Tensor:
        """Predict the masks (R, 1, size, size) from coarse logits (R, num_classes, h, w)."""
        return self._refinement(features, coarse, boxes, labels, size=size).masks()

    def steps(
        self, features: Features, coarse: Tensor, boxes: Boxes, labels: Labels, *, size: int = 224
    ) -> Iterator[RefinementStep]:
        """Yield each map of `refine`, first the regular grid's."""
        return self._refinement(features, coarse, boxes, labels, size=size).steps()

    def _refinement(self, features: Features, coarse: Tensor, boxes: Boxes, labels: Labels, *, size: int) -> Refinement:
        size = checks.integer("size", size, 1)
        rois, classes = _boxes.flatten(boxes, labels, self.num_classes, coarse.device)
        checks.shape("coarse", coarse, (rois.shape[0], self.num_classes, "h", "w"))
        sizes = grid_sizes(int(size), self.init_resolution, self.subdivision_num_points)
        head = self.point_head
        if readable(head, PointRendHead) and head.splits:
            count = rois.shape[0] * sum(_boxes.points_per_map(sizes, self.subdivision_num_points))
            fine = self._fine_product(features, count)

            def predictor(coarse: Tensor, rois: Tensor, classes: Tensor) -> Predict:
                products = list(head.coarse_shares(coarse, classes))
                return lambda points: head.finish(
                    fine(points, rois), (point_sample(product, points) for product in products), classes
                )
        else:

            def predictor(coarse: Tensor, rois: Tensor, classes: Tensor) -> Predict:
                return lambda points: head(
                    point_sample(features, points, boxes=rois, spatial_scale=self.spatial_scale),
                    point_sample(coarse, points),
                    classes,
                )

        return Refinement(predictor, (coarse, rois, classes), sizes, self.subdivision_num_points)

    def _fine_product(self, features: Features, count: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the features' product in the first layer at points of boxes, for `count` points in all.

        The features are multiplied before or after sampling, whichever is cheaper.
        """
        maps = [features] if isinstance(features, Tensor) else list(features)
        head, sample = self.point_head, functools.partial(point_sample, spatial_scale=self.spatial_scale)
        # An exported program is for any number of boxes.
        if torch.compiler.is_exporting() or sum(m.shape[0] * m.shape[2] * m.shape[3] for m in maps) > count:
            return lambda points, rois: head.fine_shares([sample(maps, points, boxes=rois)])[0]
        products = head.fine_shares(maps)
        return lambda points, rois: functools.reduce(
            torch.add, sample(products, points, boxes=rois).chunk(len(products), 1)
        )
