"""Mixins that turn finished models into their PointRend versions."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter
from typing import Any, cast

import torch
from torch import Tensor

from paper_layers._core.graft import Grafted, OutputTap, SequentialGraft, tapped
from paper_layers._core.tracing import leaf
from paper_layers.point_rend.mask import PointRendMask
from paper_layers.point_rend.semantic import PointRendSemantic


def logits_of(output: Any) -> Any:
    """Return the logits in a semantic host's output."""
    return output["out"] if isinstance(output, Mapping) and "out" in output else output


class SemanticHost(Grafted):
    """A segmentation model that refines its logits with PointRend; see `paper_layers.swap.point_rend`."""

    _graft_prefix, _graft_added = "PointRend", "point_rend"
    point_rend: PointRendSemantic
    _point_rend_taps: list[OutputTap]  # The coarse logits', then the fine features'.
    _graft_arguments = (Parameter("target", Parameter.KEYWORD_ONLY, default=None),)

    def forward(self, *args: Any, target: Tensor | None = None, **kwargs: Any) -> Any:
        """Return the host's output, with refined logits in evaluation, or logits at points in training without target.

        Args:
            *args: The host's arguments, as are the keyword arguments.
            target: Labels, int64 of shape (N, H, W). If given, the output has the loss at points as "loss_point".
        """
        output, (coarse, *features) = tapped(self._point_rend_taps, super().forward, args, kwargs)
        return refined(self.point_rend, output, coarse, features, target)


@leaf
def refined(
    point_rend: PointRendSemantic, output: Any, coarse: Tensor, features: list[Tensor], target: Tensor | None
) -> Any:
    """Return the host's output with refined logits, and with the loss at points if a target is given."""
    logits = logits_of(output)
    if not point_rend.training:
        result = point_rend(features, coarse, size=tuple(logits.shape[2:]))
    else:
        result = _with_points(point_rend, logits, coarse, features) if target is None else logits
    if output is logits and target is None:
        return result
    # A copy, as fx.Interpreter's dictionaries are read-only.
    output = {} if output is logits else output.copy()
    output["out"] = result
    if target is not None:
        output["loss_point"] = point_rend.point_loss(features, coarse, target)
    return output


def _with_points(point_rend: PointRendSemantic, logits: Tensor, coarse: Tensor, features: list[Tensor]) -> Tensor:
    """Return the map with the point head's logits at the pixels of drawn points."""
    points = point_rend.draw(coarse)
    height, width = logits.shape[2:]
    x, y = ((p * n).long().clamp(max=n - 1) for p, n in zip(points.unbind(2), (width, height), strict=True))
    points = torch.stack([(x + 0.5) / width, (y + 0.5) / height], 2)
    values = point_rend.predict(features, coarse, points).to(logits.dtype)
    fixed = values.detach()
    weighted = fixed + (values - fixed) * (height * width / points.shape[1])
    # Points on the same pixel have the same value, and scatter's backward gives each point the pixel's gradient. So a
    # pixel counts as often as it was drawn, as in the paper's loss.
    index = (y * width + x)[:, None].expand_as(weighted)
    return logits.flatten(2).scatter(2, index, weighted).unflatten(2, (height, width))


class SequentialHost(SequentialGraft, SemanticHost):
    """`SemanticHost` for an `nn.Sequential`."""


class MaskHost(Grafted):
    """torchvision's RoIHeads with the masks of PointRend; see `paper_layers.swap.point_rend`.

    Without its own mask branch the host predicts boxes (and keypoints); then PointRend predicts the boxes' masks.
    """

    _graft_prefix, _graft_added = "PointRend", "point_rend"
    point_rend: PointRendMask
    _point_rend_level: str  # The feature map's name.
    _point_rend_samples: tuple[list[Tensor], ...] = ()  # Boxes, their objects' indices, their labels.

    def check_targets(self, targets: list[dict[str, Tensor]] | None) -> None:
        """Check for masks too."""
        host = cast(Any, super())
        host.check_targets(targets)
        for number, target in enumerate(targets or ()):
            if "masks" not in target:
                raise ValueError(f"targets[{number}]: expected a key 'masks', got {', '.join(target)}")

    def select_training_samples(self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None) -> Any:
        """Keep the training boxes for `forward`."""
        host = cast(Any, super())
        samples = host.select_training_samples(proposals, targets)
        self._point_rend_samples = samples[:3]
        return samples

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Run the host, then predict the masks or add their losses; arguments and results as in torchvision."""
        result, losses = super().forward(features, proposals, image_shapes, targets)
        if self.training:
            samples, self._point_rend_samples = self._point_rend_samples, ()
            objects = [label > 0 for label in samples[2]]
            boxes, matched, labels = ([x[some] for x, some in zip(part, objects, strict=True)] for part in samples)
            masks = [target["masks"] for target in targets or ()]
            losses.update(self.point_rend(features[self._point_rend_level], boxes, labels, masks, matched=matched))
        else:
            boxes, labels = ([found[key] for found in result] for key in ("boxes", "labels"))
            masks = self.point_rend(features[self._point_rend_level], boxes, labels).sigmoid()
            for found, some in zip(result, masks.split([len(box) for box in boxes]), strict=True):
                found["masks"] = some
        return result, losses
