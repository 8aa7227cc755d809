"""The implicit point head."""

from __future__ import annotations

import math

import pytest
import torch

from paper_layers.point_rend import ImplicitPointHead
from testing.official import point_rend as official
from tests.point_rend.test_heads import LAYOUTS, arranged, numbers
from tests.point_rend.test_implicit import MATRIX
from tests.point_rend.test_semantic import F64


@pytest.mark.parametrize("num_fc", [1, 3])
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_head_equals_official(num_fc: int, agnostic: bool, layout: str) -> None:
    ours = ImplicitPointHead(6, 4, hidden_features=8, num_fc=num_fc, class_agnostic=agnostic, dtype=F64)
    theirs = official.ImplicitHead(6, 1 if agnostic else 4, 8, num_fc).double()
    theirs.load_state_dict(ours.state_dict())
    for n, p in ((3, 5), (1, 1), (0, 5), (3, 0)):
        parameters, fine = numbers(n, ours.num_params, seed=1), arranged(numbers(n, 6, p), layout)
        points = torch.rand(n, p, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
        leaves = [x.requires_grad_() for x in (fine, parameters, points)]
        labels = torch.tensor([2, 0, 3])[:n]
        every = theirs(parameters, fine, points)
        own = every if agnostic else official.of_class(every, labels)
        for chosen, expected in ((None, every), (labels, own)):
            actual = ours(*leaves, chosen)
            torch.testing.assert_close(actual, expected)
            grad = numbers(*expected.shape)
            grads = [torch.autograd.grad(y, leaves, grad, retain_graph=True) for y in (actual, expected)]
            torch.testing.assert_close(*grads)


def test_encoding_is_precise() -> None:
    """Half precision would lose whole turns of the phase."""
    head = ImplicitPointHead(6, 4, hidden_features=8)
    head.get_buffer(MATRIX).copy_(numbers(2, 128))
    points = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(0))
    t = 2 * math.pi * ((2 * points.double() - 1) @ head.get_buffer(MATRIX).double())
    expected = torch.cat([t.sin(), t.cos()], 2)
    # A perceptron with one hidden layer that returns the encoding: relu(x) - relu(-x).
    wide = ImplicitPointHead(1, 256, hidden_features=512, num_fc=1)
    wide.load_state_dict(head.state_dict())
    eye = torch.eye(256)
    first = torch.cat([torch.cat([eye, -eye]), torch.zeros(512, 1)], 1)
    parameters = torch.cat([first.flatten(), torch.cat([eye, -eye], 1).flatten(), torch.zeros(512 + 256)])
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            actual = wide(torch.zeros(2, 1, 50).to(dtype), parameters.expand(2, -1), points)
        torch.testing.assert_close(actual.mT.double(), expected, atol=torch.finfo(dtype).eps, rtol=0)
    half = [wide(torch.zeros(2, 1, 50), parameters.expand(2, -1), p) for p in (points.half(), points.half().float())]
    assert torch.equal(*half)
    exact = wide(torch.zeros(2, 1, 50), parameters.expand(2, -1), points)
    torch.testing.assert_close(exact.mT.double(), expected, atol=1e-5, rtol=0)
