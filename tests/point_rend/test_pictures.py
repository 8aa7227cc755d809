"""Pictures of the refinement."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from paper_layers.point_rend import PointRendSemantic, RefinementStep, draw_steps


@pytest.mark.parametrize("classes", [1, 3])
def test_draws_maps_and_points(classes: int) -> None:
    refine = PointRendSemantic(4, classes, hidden_features=8, subdivision_num_points=50)
    coarse, features = torch.randn(2, classes, 6, 9), torch.randn(2, 4, 12, 18)
    steps = list(refine.steps(features, coarse, (24, 36)))
    figure = draw_steps(steps, 1, image=torch.rand(3, 24, 36))
    first, *axes = figure.axes
    assert first.images[0].get_array().shape == (24, 36, 3)
    assert len(axes) == len(steps) == 3
    for one, step in zip(axes, steps, strict=True):
        shown = np.asarray(one.images[0].get_array())
        logits = step.logits[1].detach()
        expected = logits.argmax(0) if classes > 1 else logits[0].sigmoid()
        np.testing.assert_allclose(shown, expected)
        if step.points is None:
            assert not one.collections
        else:
            np.testing.assert_allclose(one.collections[0].get_offsets(), step.points[1])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_points_lie_on_their_pixels() -> None:
    """The map and the points have the same extent."""
    figure = draw_steps([RefinementStep(torch.zeros(1, 1, 4, 8), torch.tensor([[[0.0625, 0.125]]]))])
    image = figure.axes[0].images[0]
    assert list(image.get_extent()) == [0, 1, 1, 0]


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (3, 5, 7)])
def test_images(shape: tuple[int, ...]) -> None:
    figure = draw_steps([RefinementStep(torch.zeros(1, 2, 4, 8), None)], image=torch.rand(shape))
    assert figure.axes[0].images[0].get_array().shape[:2] == (5, 7)
