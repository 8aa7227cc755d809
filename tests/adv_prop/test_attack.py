"""PGD against a formula in float64; it must leave the model alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from paper_layers.adv_prop import pgd

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
SCALES: dict[str, dict[str, Any]] = {
    "0 to 1": {"bounds": (0, 1)},
    "-1 to 1": {"bounds": (-1, 1)},
    "0 to 255": {"bounds": (0.0, 255.0)},
    "mean and std": {"mean": MEAN, "std": STD},
    "tensors": {
        "mean": torch.tensor(MEAN, dtype=torch.float64),
        "std": torch.tensor(STD, dtype=torch.float64).view(3, 1, 1),
    },
}


def scaled(pixels: Tensor, scale: str) -> Tensor:
    """Scale pixels of 0 to 255 for a network."""
    if "bounds" in SCALES[scale]:
        low, high = SCALES[scale]["bounds"]
        return low + pixels / 255 * (high - low)
    shape = (1, 3, 1, 1)
    return (pixels / 255 - pixels.new_tensor(MEAN).view(shape)) / pixels.new_tensor(STD).view(shape)


def unscaled(x: Tensor, scale: str) -> Tensor:
    """Scale back to 0 to 255."""
    if "bounds" in SCALES[scale]:
        low, high = SCALES[scale]["bounds"]
        return (x - low) / (high - low) * 255
    shape = (1, 3, 1, 1)
    return (x * x.new_tensor(STD).view(shape) + x.new_tensor(MEAN).view(shape)) * 255


def linear(classes: int = 5, **factory: Any) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, classes, **factory))


def convolutional() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def batch(n: int = 6, scale: str = "0 to 1", **factory: Any) -> tuple[Tensor, Tensor]:
    return scaled(255 * torch.rand(n, 3, 4, 4, **factory), scale), torch.arange(n) % 5


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("targeted", [False, True])
def test_formula(scale: str, targeted: bool) -> None:
    """Compute the steps on 0 to 255 with the gradient of a linear softmax, W^T (p - target)."""
    model = linear(2, dtype=torch.float64)  # With two classes the wrong one isn't random.
    x, y = batch(6, scale, dtype=torch.float64)
    y = y % 2
    weight, bias = (p.detach() for p in model[1].parameters())
    pixels = unscaled(x, scale)
    moved, target = pixels, 1 - y if targeted else y
    for _ in range(4):
        p = (scaled(moved, scale).flatten(1) @ weight.T + bias).softmax(1)
        grad = ((p - F.one_hot(target, 2)) @ weight).view_as(x)  # To the scaled image: same sign.
        moved = moved + (-1.5 if targeted else 1.5) * grad.sign()
        moved = moved.clamp(pixels - 4, pixels + 4).clamp(0, 255)
    found = pgd(model, x, y, radius=4, step_size=1.5, steps=4, targeted=targeted, random_start=0, **SCALES[scale])
    torch.testing.assert_close(unscaled(found, scale), moved)
    assert (moved - pixels).abs().max() > 3.99


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_stays_in_the_ball_and_the_valid_range(scale: str, dtype: torch.dtype) -> None:
    x, y = batch(64, scale, dtype=torch.float64)
    x = x.to(dtype)
    if dtype == torch.bfloat16 and scale == "0 to 255":
        x = x.round()
    for steps in (0, 3):
        found = pgd(linear(dtype=dtype), x, y, radius=8, step_size=4, steps=steps, **SCALES[scale])
        assert found.dtype == dtype
        assert not found.requires_grad
        coarse = torch.finfo(dtype).eps * scaled(torch.full((1, 3, 1, 1), 255.0), scale).abs().double().max()
        slack = unscaled(coarse + torch.zeros(1, 3, 1, 1).double(), scale) - unscaled(
            torch.zeros(1, 3, 1, 1).double(), scale
        )
        pixels, before = unscaled(found.double(), scale), unscaled(x.double(), scale)
        assert ((pixels - before).abs() <= 8 + slack).all()
        assert ((pixels >= torch.minimum(before, torch.zeros(())) - slack) & (pixels <= 255 + slack)).all()
        assert (pixels - before).abs().max() > 7


def test_start_is_uniform_in_the_ball_and_drawn_for_each_image() -> None:
    x = torch.full((4000, 3, 2, 2), 0.5, dtype=torch.float64)
    y = torch.zeros(4000, dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, dtype=torch.float64))
    start = functools.partial(pgd, model, x, y, radius=10, steps=0, bounds=(0, 1))
    noise = 255 * (start(random_start=0.25) - x)
    moved = (noise != 0).flatten(1)
    assert (moved.all(1) == moved.any(1)).all()  # Either the whole image moved, or nothing.
    assert abs(moved.any(1).double().mean() - 0.25) < 0.03
    values = noise[moved.any(1)].flatten()
    assert values.abs().max() <= 10
    shares = torch.histc(values, 10, -10, 10) / len(values)
    assert (shares - 0.1).abs().max() < 0.012
    spread = noise[moved.any(1)].flatten(1)
    assert (spread[:, 0] - spread[:, 1]).abs().min() > 0  # Each pixel has its own noise.
    for share in (1, True, 1.0):
        assert ((start(random_start=share) != x).flatten(1).any(1)).all()


def test_start_is_clipped_to_the_valid_range() -> None:
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    found = pgd(linear(), x, torch.zeros(2, dtype=torch.int64), radius=20, steps=0, bounds=(0, 1))
    assert found.min() == 0
    assert found.max() == 1
    assert ((found - x).abs() > 0).float().mean() > 0.4


class Spy(nn.Module):
    """Return channels as logits, so that the gradient to a pixel is negative only for the target class."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.classes, 0, 0] * 1e-3


def test_targets_are_all_wrong_classes_equally_often() -> None:
    n, classes = 6000, 6
    y = torch.arange(n) % classes
    x = torch.full((n, classes, 1, 1), 0.5)
    found = pgd(Spy(classes), x, y, radius=1, steps=1, random_start=False, bounds=(0, 1))
    raised = (found > x).flatten(1)  # Only the target's channel rises.
    assert (raised.sum(1) == 1).all()
    target = raised.int().argmax(1)
    counts = torch.zeros(classes, classes).index_put_((y, target), torch.ones(n), accumulate=True)
    assert counts.diagonal().sum() == 0
    others = counts[~torch.eye(classes, dtype=torch.bool)] / (n / classes)
    assert (others - 1 / (classes - 1)).abs().max() < 0.05


def test_same_generator_same_images() -> None:
    x, y = batch()
    model = convolutional()

    def run(seed: int) -> Tensor:
        return pgd(model, x, y, random_start=0.5, bounds=(0, 1), generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_model_alone(fails: bool) -> None:
    model = convolutional().train()
    model[1].eval()  # Frozen.
    model[0].weight.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    x, y = batch()
    x.requires_grad_()
    if fails:
        with pytest.raises(ValueError, match="labels: expected classes"):
            pgd(model, x, y + 3, bounds=(0, 1))
    else:
        pgd(model, x, y, bounds=(0, 1))
    assert [m.training for m in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5]
    assert [p.grad is None for p in model.parameters()] == [*[True] * 4, False, True]
    assert (model[6].weight.grad == 1).all()
    assert x.grad is None
    assert x.requires_grad


class Counter(TorchDispatchMode):
    """Count the calls of operators, and record the output masks of convolution backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        if name == "convolution_backward":
            self.masks.append(args[-1])
        return func(*args, **(kwargs or {}))


def test_cost_is_a_forward_and_a_backward_to_the_image_for_each_step() -> None:
    x, y = batch()
    with Counter() as counter:
        pgd(convolutional(), x, y, steps=3, bounds=(0, 1))
    assert counter.calls["convolution"] == 3
    assert counter.masks == [[True, False, False]] * 3


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("targeted", [False, True])
def test_callers_without_gradients(around: Callable[[], Any], targeted: bool) -> None:
    model = convolutional().requires_grad_(False)
    x, y = batch()
    kwargs: dict[str, Any] = {"targeted": targeted, "bounds": (0, 1)}
    expected = pgd(model, x, y, **kwargs, generator=torch.Generator().manual_seed(0))
    with around():
        found = pgd(model, x.clone(), y.clone(), **kwargs, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Mixed precision takes mostly the same steps, and training in the same context still gets gradients."""
    model, (x, y) = convolutional().eval(), batch()
    kwargs: dict[str, Any] = {"targeted": False, "random_start": False, "bounds": (0, 1)}
    expected = pgd(model, x, y, **kwargs)
    with torch.autocast("cpu", dtype):
        found = pgd(model, x, y, **kwargs)
        F.cross_entropy(model(found), y).backward()
    assert found.dtype == x.dtype
    assert (found - expected).abs().mean() < 0.5 / 255
    assert all(p.grad is not None and p.grad.count_nonzero() for p in model.parameters())


def test_float16_does_not_underflow() -> None:
    model, (x, y) = linear(2, dtype=torch.float16), batch(dtype=torch.float16)
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-4e-7, 4e-7, 96).view(2, 48))  # Gradients of 1e-7: half would underflow.
    options: dict[str, Any] = {"radius": 8, "step_size": 8, "steps": 1, "bounds": (0, 1)}
    found = pgd(model, x * 0 + 0.5, y % 2, targeted=False, random_start=False, **options)
    assert (found != 0.5).all()


def test_no_gradient_no_step() -> None:
    model, (x, y) = linear(), batch()
    with torch.no_grad():
        model[1].weight[:, 3] = float("nan")
    assert torch.equal(pgd(model, x, y, random_start=False, bounds=(0, 1)), x)


def test_layout_and_other_ranks() -> None:
    x, y = batch()
    last = x.contiguous(memory_format=torch.channels_last)
    assert pgd(convolutional(), last, y, bounds=(0, 1)).is_contiguous(memory_format=torch.channels_last)
    vectors = pgd(nn.Linear(7, 3), torch.rand(4, 7), torch.zeros(4, dtype=torch.int64), bounds=(0, torch.ones(7)))
    assert vectors.shape == (4, 7)
    volumes = torch.rand(2, 3, 2, 2, 2) - 0.5
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 3))
    assert pgd(model, volumes, torch.zeros(2, dtype=torch.int64), mean=MEAN, std=STD).shape == volumes.shape
    assert pgd(convolutional(), x[:0], y[:0], bounds=(0, 1)).shape == (0, 3, 4, 4)


def test_radius_zero_is_the_image_itself() -> None:
    x, y = batch()
    x[0, 0, 0, 0] = 1 + 1e-6  # Bicubic resizing can leave such a value.
    assert torch.equal(pgd(convolutional(), x, y, radius=0, bounds=(0, 1)), x)


def test_it_fools() -> None:
    """The loss rises in both directions, more when the attack moves away from the label."""
    model, (x, y) = linear(), batch(32)
    with torch.no_grad():
        clean = F.cross_entropy(model(x), y)
        attack = functools.partial(pgd, model, x, y, radius=32, step_size=8, steps=10, bounds=(0, 1))
        away, towards = attack(targeted=False), attack()
        assert F.cross_entropy(model(away), y) > F.cross_entropy(model(towards), y) > clean


class Mapping(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x.flatten(1)}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"radius": -1}, ValueError, "radius: expected at least 0 grey levels, got -1"),
    ({"radius": float("nan")}, ValueError, "radius: .* got nan"),
    ({"radius": "4"}, TypeError, "radius: expected a number, got '4'"),
    ({"step_size": -0.5}, ValueError, "step_size: expected at least 0 grey levels, got -0.5"),
    ({"steps": -1}, ValueError, "steps: expected at least 0, got -1"),
    ({"steps": 2.0}, TypeError, "steps: expected an int, got 2.0"),
    ({"random_start": 1.5}, ValueError, "random_start: expected from 0 to 1, got 1.5"),
    ({"random_start": "yes"}, TypeError, "random_start: expected a number"),
    ({"bounds": (1, 0)}, ValueError, r"bounds: expected the value of black below that of white, got \(1, 0\)"),
    ({"bounds": (0, 0)}, ValueError, "bounds: expected the value of black below"),
    ({"bounds": 1}, TypeError, "bounds: expected a pair"),
    ({"bounds": (0, (1, 1))}, ValueError, "bounds: expected a number, or one for each of 3 channels, got 2"),
    ({"bounds": (0, float("inf"))}, ValueError, "bounds: expected finite numbers"),
    ({"bounds": ("black", "white")}, TypeError, "bounds: expected a number, or one per channel, got 'black'"),
    ({"bounds": None}, ValueError, "bounds, mean, std: .* got none of them"),
    ({"bounds": None, "mean": 0.5}, ValueError, "bounds, mean, std: .* got mean"),
    ({"mean": 0.5, "std": 0.5}, ValueError, "bounds, mean, std: .* got bounds, mean, std"),
    ({"bounds": None, "mean": MEAN, "std": (0.2, 0.2, 0)}, ValueError, "std: expected values above 0"),
    (
        {"images": torch.full((6, 3, 4, 4), 200.0)},
        ValueError,
        "images: expected values within .* range, 0 to 1 .* 200",
    ),
    ({"images": -torch.rand(6, 3, 4, 4)}, ValueError, "images: expected values within the valid range"),
    (
        {"images": torch.zeros(6, 3, 4, 4, dtype=torch.uint8)},
        TypeError,
        "images: expected one of .* got torch.uint8",
    ),
    ({"images": torch.rand(6)}, ValueError, r"images: expected shape \(N, C, ...\), got \(6,\)"),
    ({"labels": torch.arange(6)}, ValueError, "labels: expected classes from 0 to 4, got 0 to 5"),
    ({"labels": torch.arange(6) - 1}, ValueError, "labels: expected classes from 0 to 4, got -1 to 4"),
    ({"labels": torch.rand(6)}, TypeError, "labels: expected an int64 Tensor"),
    ({"labels": torch.arange(5)}, ValueError, r"labels: expected shape \(6,\), got \(5,\)"),
    ({"model": Mapping()}, TypeError, "model: expected logits as a Tensor, got dict"),
    ({"model": nn.Identity()}, ValueError, r"model's logits: expected shape \(6, classes\), got \(6, 3, 4, 4\)"),
    ({"model": linear(1)}, ValueError, r"model: .* at least 2 classes, got .* \(6, 1\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, y = batch()
    with pytest.raises(error, match=message):
        pgd(**{"model": linear(), "images": x, "labels": y, "bounds": (0, 1), **change})
