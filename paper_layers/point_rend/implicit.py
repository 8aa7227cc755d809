"""Implicit PointRend: each box's mask is a small perceptron of points, and a head predicts its parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from paper_layers._core import checks, values
from paper_layers._core.fusing import forward_method, within
from paper_layers._core.tracing import Leaf
from paper_layers.ops.point_sample import point_sample
from paper_layers.point_rend import _boxes
from paper_layers.point_rend._boxes import Boxes, Features, Labels, Predict, Refinement
from paper_layers.point_rend._repr import options
from paper_layers.point_rend._subdivision import RefinementStep, grid_sizes
from paper_layers.point_rend._targets import mask_loss, sample_masks
from paper_layers.point_rend.coarse import BoxHead

_FREQUENCIES = 128
_L2 = 1e-5


class ImplicitPointHead(Leaf):
    r"""Label the points of each box by its own perceptron, from their positions and fine features.

    .. math:: h_0 = [\sin t, \cos t, x], \quad t = 2 \pi (2 p - 1) G, \quad
        h_l = \mathrm{relu}(W_l h_{l-1} + b_l), \quad y = W h_L + b

    Section 5 of Cheng, Parkhi, Kirillov, "Pointly-Supervised Instance Segmentation", CVPR 2022, with points p in the
    box and their fine features x. The Gaussian matrix G (2, 128) is drawn once and kept as a buffer; t is computed in
    float32 at least. The module does not have parameters: each box's parameters are an input, a vector of `num_params`
    numbers, first all weights (out, in), layer by layer, then all biases.

    Args:
        in_channels: Channels of the fine features, summed over maps.
        num_classes: Classes K.
        hidden_features: Size of the hidden layers.
        num_fc: Number of hidden layers.
        class_agnostic: If True, predict one logit for all classes.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is less than 1, or an input has another shape.

    Example:
        >>> import torch
        >>> from paper_layers.point_rend import ImplicitPointHead
        >>> head = ImplicitPointHead(256, 80, class_agnostic=True)
        >>> head.num_params
        263169
        >>> head(torch.randn(8, 256, 196), torch.randn(8, head.num_params), torch.rand(8, 196, 2)).shape
        torch.Size([8, 1, 196])
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        hidden_features: int = 256,
        num_fc: int = 3,
        class_agnostic: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        in_channels, num_classes, hidden_features, num_fc = checks.positive(
            in_channels=in_channels, num_classes=num_classes, hidden_features=hidden_features, num_fc=num_fc
        )
        self.in_channels, self.num_classes = in_channels, num_classes
        self.hidden_features, self.num_fc = hidden_features, num_fc
        self.class_agnostic = class_agnostic
        widths = [2 * _FREQUENCIES + in_channels, *[hidden_features] * num_fc, 1 if class_agnostic else num_classes]
        self._shapes = [(outputs, inputs) for inputs, outputs in itertools.pairwise(widths)]
        self._sizes = [*(math.prod(shape) for shape in self._shapes), *widths[1:]]
        self.num_params = sum(self._sizes)
        matrix = torch.empty(2, _FREQUENCIES, device=device, dtype=dtype)
        self.register_buffer("positional_encoding_gaussian_matrix", matrix)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the Gaussian matrix again."""
        nn.init.normal_(self.positional_encoding_gaussian_matrix)

    def extra_repr(self) -> str:
        """Return all arguments."""
        return f"{self.in_channels}, {self.num_classes}, {options(self, 'hidden_features', 'num_fc', 'class_agnostic')}"

    def forward(self, fine: Tensor, parameters: Tensor, points: Tensor, labels: Tensor | None = None) -> Tensor:
        """Label the points.

        Args:
            fine: Features of shape (R, in_channels, P), as `paper_layers.point_sample` returns them.
            parameters: The parameters of each box's perceptron, (R, num_params).
            points: (x, y) of shape (R, P, 2), 0 to 1 across the box.
            labels: The class to predict for each row, int64 of shape (R,); default all classes.

        Returns:
            Logits of shape (R, num_classes, P), or (R, 1, P) with `labels` or `class_agnostic`.
        """
        checks.shape("fine", fine, ("R", self.in_channels, "P"))
        rows, _, count = fine.shape
        checks.shape("parameters", parameters, (rows, self.num_params))
        checks.shape("points", points, (rows, count, 2))
        if labels is not None:
            labels = values.integers("labels", labels, rows)
        parts = parameters.split(self._sizes, 1)
        weights = [part.unflatten(1, shape) for part, shape in zip(parts, self._shapes, strict=False)]
        biases = [part[:, None] for part in parts[len(weights) :]]
        if labels is not None and not self.class_agnostic:
            row = labels[:, None, None]
            weights[-1] = weights[-1].gather(1, row.expand(-1, -1, self.hidden_features))
            biases[-1] = biases[-1].gather(2, row)
        x = torch.cat([self._encode(points).to(fine.dtype), fine.mT], 2)
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            x = torch.baddbmm(bias, x, weight.mT).relu_()
        return torch.baddbmm(biases[-1], x, weights[-1].mT).mT

    def _encode(self, points: Tensor) -> Tensor:
        """Return the positional encoding (R, P, 256), in float32 at least; autocast would round a matrix product."""
        matrix = self.positional_encoding_gaussian_matrix
        x, y = (2 * points.to(torch.promote_types(points.dtype, torch.float32)) - 1).split(1, 2)
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        t = 2 * math.pi * (x * matrix[0] + y * matrix[1])
        return torch.cat([t.sin(), t.cos()], 2)


class ImplicitPointRendMask(Leaf):
    """Predict masks of boxes: a head predicts the parameters of each box's perceptron of points.

    Implicit PointRend, section 5 of Cheng, Parkhi, Kirillov, "Pointly-Supervised Instance Segmentation", CVPR 2022:
    `PointRendMask` without coarse masks. Points to train on are drawn uniformly. In inference each box's first grid
    is the largest with at most `subdivision_num_points` points; published models have 16 * 16. The losses are
    "loss_mask_point", and "loss_l2", the mean square of the predicted parameters times 1e-5.

    The parameter head's last layer is large: 270 million weights in the first example.

    Args:
        in_channels: Channels of the feature maps, summed over maps.
        num_classes: Classes K.
        spatial_scale: Pixels of a map for each pixel of the image: one number or one for each map.
        class_agnostic: If True, predict one mask for all classes.
        hidden_features: See `ImplicitPointHead`.
        num_fc: See `ImplicitPointHead`.
        parameter_hidden_channels: `hidden_channels` of the parameter head, a `BoxHead`.
        parameter_hidden_features: `hidden_features` of the parameter head.
        num_points: Points to train on in each box.
        subdivision_num_points: Points to predict in each map in inference.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A number is out of range.

    Example:
        >>> import torch
        >>> from paper_layers.point_rend import ImplicitPointRendMask
        >>> ImplicitPointRendMask(256, 80, class_agnostic=True, device="meta").parameter_head.prediction.weight.shape
        torch.Size([263169, 1024])
        >>> head = ImplicitPointRendMask(in_channels=64, num_classes=80, hidden_features=16, num_fc=2)
        >>> features, boxes = torch.randn(1, 64, 50, 76), [torch.tensor([[10.0, 20.0, 200.0, 180.0]])]
        >>> head(features, boxes, labels=[torch.tensor([17])], size=224).shape
        torch.Size([1, 1, 224, 224])
        >>> losses = head(features, boxes, labels=[torch.tensor([17])], masks=[torch.ones(1, 200, 304)])
        >>> list(losses)
        ['loss_l2', 'loss_mask_point']
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        spatial_scale: float | Sequence[float] = 0.25,
        class_agnostic: bool = False,
        hidden_features: int = 256,
        num_fc: int = 3,
        parameter_hidden_channels: int = 256,
        parameter_hidden_features: int = 1024,
        num_points: int = 14 * 14,
        subdivision_num_points: int = 28 * 28,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.spatial_scale = spatial_scale
        self.num_points, self.subdivision_num_points = checks.positive(
            num_points=num_points, subdivision_num_points=subdivision_num_points
        )
        self.point_head = ImplicitPointHead(
            in_channels,
            num_classes,
            hidden_features=hidden_features,
            num_fc=num_fc,
            class_agnostic=class_agnostic,
            device=device,
            dtype=dtype,
        )
        self.parameter_head = BoxHead(
            in_channels,
            self.point_head.num_params,
            hidden_channels=parameter_hidden_channels,
            hidden_features=parameter_hidden_features,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """Initialize the parameters as the official code does."""
        self.parameter_head.reset_parameters()
        self.point_head.reset_parameters()

    def extra_repr(self) -> str:
        """Return the options that the heads do not show."""
        return options(self, "spatial_scale", "num_points", "subdivision_num_points")

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self.point_head.num_classes

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
        """Predict the masks of the boxes, or compute the losses; see `PointRendMask.forward`."""
        parameters = within(self, "predict_parameters")(features, boxes)
        if masks is None:
            return within(self, "refine")(features, parameters, boxes, labels, size=size)
        if isinstance(boxes, Tensor):
            raise ValueError("boxes: expected a tensor for each image where there are masks, got one for all")
        rois, classes = _boxes.flatten(boxes, labels, self.num_classes, parameters.device)
        rois = _boxes.finite(rois)
        # `torch.rand` does not take symbolic sizes with a generator.
        points = parameters.new_empty(rois.shape[0], self.num_points, 2, dtype=torch.float32)
        points = points.uniform_(generator=generator)
        fine = point_sample(features, points, boxes=rois, spatial_scale=self.spatial_scale)
        logits = self.point_head(fine, parameters, points, classes)[:, 0]
        square = parameters.to(torch.promote_types(parameters.dtype, torch.float32)).square().sum()
        return {
            "loss_l2": _L2 * square / max(parameters.numel(), 1),
            "loss_mask_point": mask_loss(logits, sample_masks(masks, points, boxes, matched)),
        }

    @forward_method
    def predict_parameters(self, features: Features, boxes: Boxes) -> Tensor:
        """Predict the parameters (R, num_params) of the boxes' perceptrons."""
        return self.parameter_head(
            _boxes.grid_features(features, boxes, 2 * self.parameter_head.side, self.spatial_scale)
        )

    @forward_method
    def refine(
        self, features: Features, parameters: Tensor, boxes: Boxes, labels: Labels, *, size: int = 224
    ) -> Tensor:
        """Predict the masks (R, 1, size, size) by perceptrons with these parameters."""
        return self._refinement(features, parameters, boxes, labels, size=size).masks()

    def steps(
        self, features: Features, parameters: Tensor, boxes: Boxes, labels: Labels, *, size: int = 224
    ) -> Iterator[RefinementStep]:
        """Yield each map of `refine`, first the regular grid's."""
        return self._refinement(features, parameters, boxes, labels, size=size).steps()

    def _refinement(
        self, features: Features, parameters: Tensor, boxes: Boxes, labels: Labels, *, size: int
    ) -> Refinement:
        size = checks.integer("size", size, 1)
        rois, classes = _boxes.flatten(boxes, labels, self.num_classes, parameters.device)
        checks.shape("parameters", parameters, (rois.shape[0], self.point_head.num_params))

        def predictor(parameters: Tensor, rois: Tensor, classes: Tensor) -> Predict:
            def predict(points: Tensor) -> Tensor:
                fine = point_sample(features, points, boxes=rois, spatial_scale=self.spatial_scale)
                return self.point_head(fine, parameters, points, classes)

            return predict

        sizes = grid_sizes(int(size), 1, self.subdivision_num_points)
        return Refinement(predictor, (parameters, rois, classes), sizes, self.subdivision_num_points)
