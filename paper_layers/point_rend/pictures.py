"""Draw the refinement with matplotlib."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paper_layers.point_rend._subdivision import RefinementStep

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_steps(steps: Iterable[RefinementStep], index: int = 0, image: Tensor | None = None) -> Figure:
    """Draw the maps of a refinement side by side, with the points predicted for each.

    See figures 1 and 4 of Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as Rendering", CVPR 2020. With
    several classes each pixel shows its most likely class, with one class its probability.

    Args:
        steps: Returned by `PointRendSemantic.steps` or `PointRendMask.steps`.
        index: The image or box to draw.
        image: An image to draw first, of shape (H, W), (1, H, W) or (3, H, W), values from 0 to 1.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed: ``pip install paper-layers[pictures]``.

    Example:
        >>> import torch
        >>> from paper_layers.point_rend import PointRendSemantic, draw_steps
        >>> refine = PointRendSemantic(in_channels=8, num_classes=3, subdivision_num_points=100)
        >>> steps = refine.steps(torch.randn(1, 8, 16, 16), torch.randn(1, 3, 8, 8), size=(32, 32))
        >>> len(draw_steps(steps).axes)
        3
    """
    from matplotlib.figure import Figure

    drawn = [(step.logits[index].detach().float().cpu(), step.points) for step in steps]
    figure = Figure(figsize=(2.6 * (len(drawn) + (image is not None)), 2.9), layout="constrained")
    axes = list(figure.subplots(1, len(drawn) + (image is not None), squeeze=False)[0])
    for one in axes:
        one.set_axis_off()
    if image is not None:
        picture = image.detach().float().cpu()
        picture = picture if picture.dim() == 2 else picture.movedim(0, -1).squeeze(-1)
        axes.pop(0).imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
    for one, (logits, points) in zip(axes, drawn, strict=True):
        classes, height, width = logits.shape
        # The points' coordinates go from 0 to 1 as well.
        place = {"extent": (0, 1, 1, 0), "interpolation": "nearest", "aspect": height / width}
        if classes == 1:
            one.imshow(torch.sigmoid(logits[0]).numpy(), cmap="gray", vmin=0, vmax=1, **place)
        else:
            one.imshow(logits.argmax(0).numpy(), cmap="tab20", vmin=0, vmax=max(classes - 1, 19), **place)
        title = f"{height} x {width}"
        if points is not None:
            x, y = points[index].detach().float().cpu().unbind(-1)
            one.scatter(x.numpy(), y.numpy(), s=max(0.3, 2000 / height**2), c="#e11d48", linewidths=0)
            title += f", {len(x):,} points"
        one.set_title(title, fontsize=9)
    return figure
