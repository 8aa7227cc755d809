"""Masks of boxes: the procedure that PointRend's mask head and the implicit one share."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from paper_layers._core import checks, values
from paper_layers._core.fusing import forward_method, within
from paper_layers._core.tracing import Leaf
from paper_layers.ops.point_sample import point_sample
from paper_layers.point_rend.coarse import BoxHead
from paper_layers.point_rend.subdivision import Size, Step, grid_sizes, last, regular_grid, subdivide
from paper_layers.point_rend.targets import Boxes, finite, mask_loss, rows, sample_masks

Sampler = Callable[[Tensor, Tensor], Tensor]  # From points (R, P, 2) in boxes (R, 5).

# Points that are predicted at once in inference. With the usual widths each tensor of them has 3 MB: it stays in the
# cache, and far below the 32 MB from where glibc maps new pages for each tensor.
_CHUNK = 4 * 28 * 28


class BoxMasks(Leaf, abc.ABC):
    """Masks from a coarse look at each box, whatever comes of it, and from what labels points in it with that."""

    def __init__(
        self,
        spatial_scale: float | Sequence[float],
        num_points: int,
        subdivision_num_points: int,
        init_resolution: int = 1,
    ):
        super().__init__()
        num_points, init_resolution, subdivision_num_points = checks.positive(
            num_points=num_points, init_resolution=init_resolution, subdivision_num_points=subdivision_num_points
        )
        self.spatial_scale = spatial_scale
        self.num_points, self.init_resolution = num_points, init_resolution
        self.subdivision_num_points = subdivision_num_points

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
            labels: The class of each box, integers from 0 to K - 1: a tensor (R_i,) for each image, or one (R,) of all.
            masks: The true masks of each image, (M_i, H_i, W_i) of any dtype at the size of the image, values from 0
                to 1; -1 is a pixel that does not count. Divide masks of 0 and 255 by 255.
            matched: For each image the number of each box's mask, integers (R_i,); default the box's own number.
            size: Side of the masks in pixels; any.
            generator: What the points to train on are drawn from; default torch's own.

        Returns:
            Logits of the boxes' own classes, of shape (R, 1, size, size); or two losses by name. They are zero where
            there are no boxes.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: Shapes do not fit; a label, a mask's value or number is out of range; a box to train on is not
                finite. On CUDA values are found as an index out of range is: after the call.
        """
        coarse = within(self, "coarse")(features, boxes)
        if masks is None:
            return within(self, "refine")(coarse, features, boxes, labels, size)
        if isinstance(boxes, Tensor):
            raise ValueError("boxes: expected a tensor for each image where there are masks, got one for all")
        rois, classes = self._rows(boxes, labels, coarse.device)
        rois = finite(rois)
        points = self._draw(coarse, classes, generator)
        fine = point_sample(features, points, boxes=rois, spatial_scale=self.spatial_scale)
        logits = self._logits(coarse, fine, points, classes)[:, 0]
        return {
            **self._losses(coarse, classes, masks, boxes, matched),
            "loss_mask_point": mask_loss(logits, sample_masks(masks, points, boxes, matched)),
        }

    def _rows(self, boxes: Boxes, labels: Tensor | Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """All boxes (R, 5), with the image's number first, and their classes (R,), none of which is out of range."""
        rois, classes = rows(boxes, labels, device)
        # An exported program should need no Python for a check that the layers make as well.
        known = torch.compiler.is_exporting()
        return rois, classes if known else values.labels("labels", classes, self.num_classes)

    @property
    @abc.abstractmethod
    def num_classes(self) -> int:
        """Classes K."""

    @abc.abstractmethod
    def coarse(self, features: Tensor | Sequence[Tensor], boxes: Boxes) -> Tensor:
        """What comes of the coarse look at the boxes, (R, ...)."""

    @property
    @abc.abstractmethod
    def _coarse_shape(self) -> tuple[int | str, ...]:
        """The sizes of `coarse` but for the first; names stand for any."""

    @abc.abstractmethod
    def _draw(self, coarse: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Points (R, num_points, 2) to train on."""

    @abc.abstractmethod
    def _logits(self, coarse: Tensor, fine: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        """The logits (R, 1, P) at points (R, P, 2) with fine features (R, C, P)."""

    @abc.abstractmethod
    def _losses(
        self,
        coarse: Tensor,
        labels: Tensor,
        masks: Sequence[Tensor],
        boxes: Sequence[Tensor],
        matched: Sequence[Tensor] | None,
    ) -> dict[str, Tensor]:
        """The losses beside that of the points."""

    def _look(self, head: BoxHead, features: Tensor | Sequence[Tensor], boxes: Boxes) -> Tensor:
        """The head's prediction for the boxes, from the features on a regular grid in each."""
        count = boxes.shape[0] if isinstance(boxes, Tensor) else sum(box.shape[0] for box in boxes)
        side = 2 * head.side
        first = features if isinstance(features, Tensor) else features[0]
        grid = regular_grid(count, (side, side), first.device)
        return head(point_sample(features, grid, boxes=boxes, spatial_scale=self.spatial_scale))

    @forward_method
    def refine(
        self,
        coarse: Tensor,
        features: Tensor | Sequence[Tensor],
        boxes: Boxes,
        labels: Tensor | Sequence[Tensor],
        size: int = 224,
    ) -> Tensor:
        """The masks (R, 1, size, size) from what `coarse` gives; a few boxes at a time."""
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
        size = checks.integer("size", size, 1)
        rois, classes = self._rows(boxes, labels, coarse.device)
        expected = (rois.shape[0], *self._coarse_shape)
        if coarse.dim() != len(expected) or coarse.shape[:2] != expected[:2]:
            raise ValueError(f"coarse: expected shape ({', '.join(map(str, expected))}), got {tuple(coarse.shape)}")
        sizes = grid_sizes(int(size), self.init_resolution, self.subdivision_num_points)
        return rois, classes, sizes, self._fine(features, rois.shape[0] * sum(self._points(sizes)))

    def _points(self, sizes: list[Size]) -> list[int]:
        """How many points of each map are predicted."""
        first, *rest = (height * width for height, width in sizes)
        return [first, *(min(pixels, self.subdivision_num_points) for pixels in rest)]

    def _fine(self, features: Tensor | Sequence[Tensor], count: int) -> Sampler:
        """What `_predictor` takes of the features, of so many points altogether."""
        return lambda points, rois: point_sample(features, points, boxes=rois, spatial_scale=self.spatial_scale)

    def _predictor(self, coarse: Tensor, rois: Tensor, labels: Tensor, fine: Sampler) -> Callable[[Tensor], Tensor]:
        """The function from points (R, P, 2) in the boxes to logits (R, 1, P)."""
        return lambda points: self._logits(coarse, fine(points, rois), points, labels)

    def _steps(self, coarse: Tensor, rois: Tensor, labels: Tensor, sizes: list[Size], fine: Sampler) -> Iterator[Step]:
        predict = self._predictor(coarse, rois, labels, fine)
        points = regular_grid(rois.shape[0], sizes[0], coarse.device).flatten(1, 2)
        logits = predict(points).unflatten(2, sizes[0])
        yield Step(logits, points)
        yield from subdivide(logits, sizes[1:], self.subdivision_num_points, predict)
