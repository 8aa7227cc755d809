"""The run that tells shapes: it lets hosts live by their hooks, and changes nothing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from paper_layers import LIPPool2d, swap


class Flagged(nn.Module):
    """Has an attribute that is named like torch's hooks."""

    def __init__(self) -> None:
        super().__init__()
        self._output_capturing_hooks_installed = self.flag = True
        self.conv, self.pool = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        assert self.flag is True
        return self.pool(self.conv(x))


class Capturing(nn.Module):
    """Lives by a hook, which is a function, a method or a callable object."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.pool, self.seen = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), []
        hooks = {"function": lambda m, a, out: self.seen.append(out), "method": self.keep, "partial": Keep(self.seen)}
        self.body.register_forward_hook(hooks[kind])

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.clear()
        self.body(x)
        return self.pool(self.seen[0])


class Keep:
    def __init__(self, seen: list[Tensor]):
        self.seen = seen

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)


def test_hooks_that_a_host_lives_by() -> None:
    assert swap.pooling(Flagged()).pool.channels == 8
    for kind in ("function", "method", "partial"):
        model = Capturing(kind)
        assert swap.pooling(model).pool.channels == 8
        assert model.seen == []
        model(torch.randn(1, 3, 8, 8))
        assert not model.seen[0].is_meta


class Busy(nn.Module):
    """Lives by hooks that hold its own modules in many ways, draws, counts and notes things; its values count."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.drop, self.pool = nn.Conv2d(3, 8, 3), nn.Dropout(), nn.MaxPool2d(2)
        self.notes: dict[str, Tensor] = {}
        self.register_buffer("calls", torch.zeros(()))
        body, notes = self.body, self.notes

        def note(output: Tensor) -> None:
            body.last, notes["last"] = output, output * body.weight.mean()

        hooks: dict[str, Callable[..., Any]] = {
            "nested": lambda *a: (lambda: note(a[2]))(),
            "default": lambda m, a, output, body=body: body.__dict__.update(last=output),
            "partial": functools.partial(lambda note, m, a, output: note(output), note),
            "method": Outside(body, note).hook,
        }
        self.body.register_forward_hook(hooks[kind])

    def forward(self, x: Tensor) -> Tensor:
        self.body(x + torch.rand_like(x))
        self.calls += 1
        self.seen = True
        return self.pool(self.drop(self.body.last)) if float(self.calls) else x


class Outside:
    def __init__(self, body: nn.Module, note: Callable[[Tensor], None]):
        self.held = [(body, note)]

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.held[0][1](output)


@pytest.mark.parametrize("kind", ["nested", "default", "partial", "method"])
def test_a_trial_changes_nothing(kind: str) -> None:
    model = Busy(kind)
    model.drop.eval()
    own = [{**vars(module)} for module in model.modules()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    swap.pooling(model, "identity", example_input=(example := torch.ones(1, 3, 8, 8)))
    assert isinstance(model.pool, LIPPool2d)
    assert torch.equal(random, torch.get_rng_state())
    assert (example == 1).all()
    for module, before in zip(list(model.modules())[:3], own, strict=False):
        assert {**vars(module)} == before
    torch.testing.assert_close(dict(model.state_dict()), dict(state))
    assert (model.notes, model.training, model.drop.training) == ({}, True, False)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("surgery", "layers"),
    [
        (swap.pooling, (nn.LazyConv2d(8, 3), nn.MaxPool2d(2))),
        (swap.split_batch_norm, (nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d())),
        (swap.strided_conv, (nn.LazyConv2d(8, 3, stride=2),)),
    ],
)
def test_lazy_modules_run_first(surgery: Any, layers: tuple[nn.Module, ...]) -> None:
    model, example = nn.Sequential(*layers), torch.ones(2, 3, 8, 8)
    with pytest.raises(ValueError, match="run it once first"):
        surgery(model)
    assert any(map(is_lazy, model.parameters()))
    model(example)
    surgery(model)(example)


def test_hooks_that_a_host_can_do_without_do_not_run() -> None:
    model, calls = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    swap.pooling(model)
    assert calls == []


def test_hooks_that_change_what_reaches_a_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2))
    model[1].register_forward_pre_hook(lambda _, args: torch.cat([args[0], args[0]], 1))
    model[1].register_forward_pre_hook(lambda _, args, kwargs: (args, {}), with_kwargs=True)
    assert swap.pooling(model)[1].channels == 16
    assert model(torch.ones(1, 3, 8, 8)).shape == (1, 16, 3, 3)
