"""Surgery on pools: their geometry, and the trial run that counts their channels."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers import swap
from paper_layers.lip import LIPPool2d
from tests.lip.surgeries import count, images, sequential


@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
@pytest.mark.parametrize(
    "geometry",
    [
        *[(2,), (3, 2, 1), (3, 1, 1), ((3, 2), (2, 1), (1, 0)), ([3, 2], [2, 1], [1, 0]), (2, 2, 0, True)],
        *[((2,),), ([3], (2,), [1]), (2, ()), ([3], [])],
    ],
)
def test_pool_geometry(kind: type[nn.Module], geometry: tuple[Any, ...]) -> None:
    kernel, *others = geometry
    names = ("stride", "padding", "ceil_mode")
    pool = kind(kernel, **dict(zip(names, others, strict=False)))
    x = images(2, 3, 11, 14)
    average = F.avg_pool2d(x, kernel, *others, count_include_pad=False)
    model = swap.pooling(nn.Sequential(pool), example_input=x)
    torch.testing.assert_close(model(x), average)
    sample = images(3, 11, 14)
    assert model(sample).shape == pool(sample).shape == average.shape[1:]


def test_shared_pool_with_several_channel_counts() -> None:
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), pool, nn.Conv2d(4, 6, 1), pool)
    with pytest.raises(ValueError, match=r"model\.1: expected one number of channels, got 4 and 6"):
        swap.pooling(model)


class Branching(nn.Module):
    """Draw random numbers, set an attribute, and call a pool by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last, self.pool = sequential(), None, nn.MaxPool2d(2)

    def forward(self, x: Tensor, others: list[Tensor]) -> Tensor:
        noise = torch.rand(1, device="cpu")
        self.last = self.body(x * 2 + torch.zeros(1)) + others[0].mean()
        return self.pool(input=self.last) * noise.to(self.last.device)


def test_run_leaves_no_trace() -> None:
    model, example = Branching(), (images(1, 3, 20, 20), [images(5)])
    for module in model.modules():
        module.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: devices.update({args[0].device.type} if args else ())
    )
    devices: set[str] = set()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state(), random.getstate()
    try:
        swap.pooling(model, "identity", example_input=example)
    finally:
        handle.remove()
    assert torch.equal(rng[0], torch.get_rng_state())
    assert rng[1] == random.getstate()
    assert devices == {"meta"}
    assert model.last is None
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert [m.channels for m in model.modules() if type(m) is LIPPool2d] == [8, 8]


def test_run_broken_off_after_the_pools() -> None:
    model = nn.Sequential(sequential(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
    assert swap.pooling(model)(images()).shape == (2, 10)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (nn.MaxPool2d(2, dilation=2), "expected dilation=1, got 2"),
        (nn.MaxPool2d(2, return_indices=True), "expected return_indices=False, got True"),
        (nn.AvgPool2d(2, divisor_override=3), "expected divisor_override=None, got 3"),
    ],
)
def test_pool_without_counterpart(pool: nn.Module, message: str) -> None:
    model = nn.Sequential(sequential(), pool)
    with pytest.raises(ValueError, match=rf"model\.1: {message}"):
        swap.pooling(model)
    assert count(model, LIPPool2d) == 0
    assert swap.pooling(model, filter_fn=lambda module, name: name != "1")[1] is pool
    assert type(pool) is not LIPPool2d


def test_pool_that_is_never_reached() -> None:
    model = sequential()
    model[2].unused = nn.MaxPool2d(2)
    with pytest.raises(ValueError, match=r"model\.2\.unused: .* got no input at all in the trial run"):
        swap.pooling(model)
    assert count(model, LIPPool2d) == 0


def test_run_that_fails() -> None:
    model = nn.Sequential(nn.Linear(10, 4), nn.Unflatten(1, (4, 1, 1)), nn.MaxPool2d(1))
    with pytest.raises(ValueError, match=r"example_input: expected an input for a model that has no nn\.Conv2d"):
        swap.pooling(model)
    with pytest.raises(
        ValueError, match=r"example_input: expected an input that runs .* as far as model\.2, got Runtime"
    ):
        swap.pooling(model, example_input=images(2, 7))
    assert swap.pooling(model, "identity", example_input=images(2, 10))[2].channels == 4
