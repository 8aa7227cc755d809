"""LazyLIPPool2d before, at and after its first input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from paper_layers.lip import LazyLIPPool2d, LIPPool2d

FORMS = ("bottleneck", "projection", "simplified", "identity")


@pytest.mark.parametrize("form", FORMS)
def test_becomes_the_pool_of_its_first_input(form: str) -> None:
    lazy = LazyLIPPool2d(2, 2, 0, logit=form, hidden_channels=8, ceil_mode=True, zero_init="conv")
    assert "LazyLIPPool2d" in repr(lazy)
    assert f"logit={form!r}" in repr(lazy)
    before = list(lazy.parameters())
    x = torch.randn(2, 6, 9, 9)
    y = lazy(x)
    assert type(lazy) is LIPPool2d
    eager = LIPPool2d(6, 2, 2, 0, logit=form, hidden_channels=8, ceil_mode=True, zero_init="conv")
    assert repr(lazy) == repr(eager)
    torch.testing.assert_close(y, eager(x))
    # An optimizer that was made before the first input still holds the parameters.
    assert all(a is b for a, b in zip(before, lazy.parameters(), strict=True))
    assert not any(map(is_lazy, before))
    assert [p.shape for p in before] == [p.shape for p in eager.parameters()]
    eager.load_state_dict(lazy.state_dict())


def test_moves_before_the_first_input() -> None:
    lazy = LazyLIPPool2d(dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in lazy.parameters())
    lazy.to(torch.bfloat16)
    y = lazy(torch.randn(2, 6, 9, 9, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for p in lazy.parameters())
    meta = LazyLIPPool2d(device="meta")
    assert meta(torch.randn(2, 6, 9, 9, device="meta")).shape == (2, 6, 5, 5)


@pytest.mark.parametrize("form", FORMS)
def test_state_dicts(form: str) -> None:
    eager = nn.Sequential(LIPPool2d(6, logit=form, hidden_channels=8, zero_init=None))
    x = torch.randn(2, 6, 9, 9)
    lazy = nn.Sequential(LazyLIPPool2d(logit=form, hidden_channels=8))
    # A lazy pool's state dict, loaded into another lazy pool, leaves it lazy.
    other = nn.Sequential(LazyLIPPool2d(logit=form, hidden_channels=8))
    other.load_state_dict(lazy.state_dict())
    assert other[0].channels == 0
    assert lazy.state_dict().keys() == eager.state_dict().keys()
    lazy.load_state_dict(eager.state_dict())
    assert torch.equal(lazy(x), eager(x))
    assert type(lazy[0]) is LIPPool2d
    assert lazy[0].channels == 6


def test_copies_are_independent() -> None:
    lazy = LazyLIPPool2d()
    twin = copy.deepcopy(lazy)
    twin(torch.randn(2, 6, 9, 9))
    lazy(torch.randn(2, 4, 9, 9))
    assert (lazy.channels, twin.channels) == (4, 6)


def test_logit_of_ones_own() -> None:
    conv = nn.LazyConv2d(6, 1)
    lazy = LazyLIPPool2d(logit=conv)
    x = torch.randn(2, 6, 9, 9)
    lazy(x)
    assert type(lazy) is LIPPool2d
    assert lazy.channels == 6
    assert lazy.logit is conv
    assert conv.in_channels == 6


def test_bad_first_input() -> None:
    lazy = LazyLIPPool2d()
    with pytest.raises(ValueError, match=r"input: expected shape \(N, C, H, W\)"):
        lazy(torch.randn(6, 8))
    lazy(torch.randn(2, 6, 9, 9))
    with pytest.raises(ValueError, match=r"input: expected shape \(N, 6, H, W\)"):
        lazy(torch.randn(2, 5, 9, 9))


@pytest.mark.parametrize("missing", ["logit.head.norm.weight", "logit.head", "logit.stem"])
def test_parts_of_a_state_dict(missing: str) -> None:
    eager, lazy = (LIPPool2d(6, hidden_channels=4), LazyLIPPool2d(hidden_channels=4))
    state = {name: value for name, value in eager.state_dict().items() if not name.startswith(missing)}
    assert all(name.startswith(missing) for name in lazy.load_state_dict(state, strict=False).missing_keys)
    assert lazy.channels == 6
    for name, value in lazy.state_dict().items():
        assert torch.equal(value, state.get(name, value))
        assert value.isfinite().all()
    assert torch.equal(lazy.logit.stem.norm2.weight, torch.ones(4))
    assert torch.equal(lazy.logit.head.norm.weight, torch.zeros(6))


def test_meta_device_before_the_first_input() -> None:
    """Torch turns lazy parameters into empty ones there."""
    lazy = LazyLIPPool2d().to("meta")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"without a shape before the first input, got one of shape \(0,\)"):
            lazy(torch.randn(2, 6, 9, 9, device="meta"))


@pytest.mark.filterwarnings("ignore")
def test_traced_on_its_first_input() -> None:
    x = torch.randn(2, 6, 9, 9)
    traced = torch.jit.trace(LazyLIPPool2d(logit="identity"), x, check_trace=False)
    torch.testing.assert_close(traced(2 * x), LIPPool2d(6, logit="identity")(2 * x))
