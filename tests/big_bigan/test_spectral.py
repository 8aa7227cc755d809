"""The linear layer with a spectral norm against torch's own."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from paper_layers.big_bigan import SpectralLinear

# The package has a function of this name.
spectral_linear = importlib.import_module("paper_layers.ops.spectral_linear")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_spectral_linear_is_torchs(training: bool, bias: bool) -> None:
    """Outputs, gradients, second derivatives and updated vectors equal those of torch's parametrization."""
    theirs = spectral_norm(nn.Linear(6, 5, bias=bias)).double().train(training)
    ours = spectral_norm(SpectralLinear(6, 5, bias=bias)).double().train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 6, dtype=torch.double, requires_grad=True)
    found = []
    for layer in (theirs, ours):
        leaves = [x, *layer.parameters()]
        y = layer(x)
        first = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
        found.append((y, *first, *second, *layer.buffers(), layer.weight))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_spectral_linear_second_derivatives() -> None:
    layer = spectral_norm(SpectralLinear(3, 4)).double().eval()
    x = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_spectral_linear_under_a_loss_scale() -> None:
    """The gradient of sigma, a sum above float16's maximum, does not overflow."""
    layer = spectral_norm(SpectralLinear(64, 64)).eval()
    x = torch.rand(512, 64) + 0.5
    slope = 20 * layer(x).detach()
    assert (slope * layer(x)).sum() > 2 * torch.finfo(torch.float16).max
    with torch.autocast("cpu", torch.float16):
        layer(x).backward(slope.half())
    half = layer.parametrizations.weight.original.grad
    (expected,) = torch.autograd.grad(layer(x), layer.parametrizations.weight.original, slope)
    torch.testing.assert_close(half, expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_frozen_weights_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = spectral_norm(SpectralLinear(3, 4)).requires_grad_(False).eval()
    x = torch.randn(2, 3, requires_grad=True)
    given, op = [], spectral_linear.linear_backward
    monkeypatch.setattr(spectral_linear, "linear_backward", lambda *args: given.append(args[-3:]) or op(*args))
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 3))
    assert given == [(True, False, False)]


def test_spectral_linear_without_its_norm() -> None:
    layer = spectral_norm(SpectralLinear(3, 4))
    nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
