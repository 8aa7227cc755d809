"""Semantic models of torchvision and others, swapped to PointRend models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
import timm
# isort: on

from torchvision.models import segmentation

from paper_layers import point_sample, sample_uncertain_points, swap
from paper_layers.point_rend import PointRendSemantic

F64 = torch.float64
CLASSES = 5
# Points are float32, whatever the maps are.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


class Net(nn.Module):
    """An ordinary encoder-decoder that returns a map or a dict."""

    def __init__(self, as_dict: bool = False, **factory: Any):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, **factory), nn.BatchNorm2d(8, **factory), nn.ReLU())
        self.body = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, 2, 1, **factory), nn.ReLU())
        self.head = nn.Conv2d(12, CLASSES, 1, **factory)
        self.as_dict = as_dict

    def forward(self, image: Tensor, shift: float = 0.0) -> Any:
        low = self.head(self.body(self.stem(image))) + shift
        out = F.interpolate(low, image.shape[2:], mode="bilinear", align_corners=False)
        return {"features": low, "out": out} if self.as_dict else out


FEW: dict[str, Any] = {"hidden_features": 16, "num_points": 60, "subdivision_num_points": 40}
NAMES: dict[str, Any] = {"fine": ["stem", "body"], "coarse": "head"}


def net(as_dict: bool = False, **factory: Any) -> Any:
    return swap.point_rend(Net(as_dict, **factory), **NAMES, **FEW)


def images(*size: int, **factory: Any) -> Tensor:
    return torch.randn(*(size or (2, 3, 32, 48)), **factory)


def labels(*size: int) -> Tensor:
    return torch.randint(CLASSES, size or (2, 32, 48))


def maps(model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Compute coarse logits and fine features of a Net."""
    fine = model.stem(x)
    body = model.body(fine)
    return model.head(body), [fine, body]


def stages(model: Any, x: Tensor, last: str) -> Tensor:
    for name, part in model.backbone.items():
        x = part(x)
        if name == last:
            return x
    raise KeyError(last)


TORCHVISION: dict[str, tuple[Callable[..., nn.Module], str, int]] = {
    "fcn_resnet50": (segmentation.fcn_resnet50, "layer1", 256),
    "deeplabv3_resnet50": (segmentation.deeplabv3_resnet50, "layer1", 256),
    "deeplabv3_mobilenet": (segmentation.deeplabv3_mobilenet_v3_large, "3", 24),
    "lraspp_mobilenet": (segmentation.lraspp_mobilenet_v3_large, "3", 24),
}


@pytest.mark.parametrize("host", TORCHVISION)
def test_torchvision(host: str) -> None:
    build, stage, channels = TORCHVISION[host]
    aux = {"aux_loss": True} if "lraspp" not in host else {}
    model: Any = build(weights=None, weights_backbone=None, num_classes=CLASSES, **aux).eval()
    kind, old = type(model), {name: (p, p.clone()) for name, p in model.named_parameters()}
    x = images()
    with torch.no_grad():
        plain = model(x)
        assert swap.point_rend(model, subdivision_num_points=100) is model
        assert isinstance(model, kind)
        assert isinstance(model.point_rend, PointRendSemantic)
        assert not model.point_rend.training
        assert model.point_rend.point_head.in_channels == channels
        new = dict(model.named_parameters())
        assert all(new[name] is p and torch.equal(p, value) for name, (p, value) in old.items())
        assert all(name.startswith("point_rend.point_head.") for name in new.keys() - old.keys())

        actual = model(x)
        assert list(actual) == list(plain)
        features = model.backbone(x)
        coarse = model.classifier(features if "lraspp" in host else features["out"])
        expected = model.point_rend(stages(model, x, stage), coarse, size=(32, 48))
    torch.testing.assert_close(actual["out"], expected)
    assert not torch.allclose(actual["out"], plain["out"])
    if aux:
        assert torch.equal(actual["aux"], plain["aux"])

    # Train with the loop of torchvision's reference, which does not handle points.
    output = model.train()(x)
    loss = sum(F.cross_entropy(out, labels(), ignore_index=255) for out in output.values())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.point_rend.point_head.predictor.weight.grad.count_nonzero()
    assert list(model(x, target=labels())) == [*plain, "loss_point"]


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("size", [(32, 48), (40, 56)])
def test_evaluation(as_dict: bool, size: tuple[int, int]) -> None:
    model = net(as_dict).eval()
    x = images(2, 3, *size)
    coarse, features = maps(model, x)
    expected = model.point_rend(features, coarse, size=size)
    actual = model(x)
    if as_dict:
        assert list(actual) == ["features", "out"]
        torch.testing.assert_close(actual["features"], coarse)
        actual = actual["out"]
    torch.testing.assert_close(actual, expected)
    scored = model(x, target=labels(2, *size))
    assert list(scored) == (["features", "out", "loss_point"] if as_dict else ["out", "loss_point"])
    torch.testing.assert_close(scored["out"], expected)


def by_hand(model: Any, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the map in training, and the paper's loss at the points plus the coarse map's loss elsewhere."""
    coarse, features = maps(model, x)
    size = torch.tensor([x.shape[3], x.shape[2]])
    pixels = (sample_uncertain_points(coarse, 60) * size).floor()
    points = (pixels + 0.5) / size
    logits = model.point_rend.point_head(point_sample(features, points), point_sample(coarse, points))
    column, row = pixels.long().unbind(2)
    image = torch.arange(len(x))[:, None]
    at_points = F.cross_entropy(logits, target[image, row, column])

    full = F.interpolate(coarse, x.shape[2:], mode="bilinear", align_corners=False)
    each = F.cross_entropy(full, target, reduction="none")
    elsewhere = torch.ones_like(each).index_put((image, row, column), torch.zeros(()).to(each))
    full = full.detach().clone()
    for n, p in torch.cartesian_prod(torch.arange(len(x)), torch.arange(60)).tolist():
        full[n, :, row[n, p], column[n, p]] = logits[n, :, p].detach()
    return full, at_points + (each * elsewhere).mean()


@pytest.mark.parametrize("size", [(32, 48), (8, 8)])
def test_training_without_target(size: tuple[int, int]) -> None:
    """The host's loss trains the point head as the paper's does, though on (8, 8) many points fall on one pixel."""
    model = net(dtype=F64)
    x, target = images(2, 3, *size, dtype=F64), labels(2, *size)
    torch.manual_seed(1)
    output = model(x)
    torch.manual_seed(1)
    expected, loss = by_hand(model, x, target)
    torch.testing.assert_close(output, expected, **CLOSE)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(output, target), parameters)
    for actual, wanted in zip(grads, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)


@pytest.mark.parametrize("as_dict", [False, True])
def test_training_with_target(as_dict: bool) -> None:
    model, plain = net(as_dict), Net()
    plain.load_state_dict(model.state_dict(), strict=False)
    x, target = images(), labels()
    target[:, :9] = 255
    coarse, features = maps(copy.deepcopy(model), x)
    torch.manual_seed(1)
    output = model(x, target=target)
    torch.manual_seed(1)
    expected = model.point_rend(features, coarse, target)["loss_sem_seg_point"]
    assert list(output) == (["features", "out", "loss_point"] if as_dict else ["out", "loss_point"])
    torch.testing.assert_close(output["out"], plain(x))
    torch.testing.assert_close(output["loss_point"], expected)
    output["loss_point"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_learns_what_the_coarse_map_cannot() -> None:
    """The stripes are one or two pixels wide, too thin for the coarse map of stride 8."""
    model = swap.point_rend(Net(), **NAMES, hidden_features=32, num_points=256, subdivision_num_points=32 * 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x = F.interpolate(torch.randn(16, 3, 16, 16), scale_factor=2)
    target = (x[:, 0] > 0).long()
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with torch.no_grad():
        coarse, _ = maps(model, x)
        upsampled = F.interpolate(coarse, (32, 32), mode="bilinear", align_corners=False)
        errors = [(y.argmax(1) != target).float().mean() for y in (upsampled, model(x))]
    assert errors[1] < 0.6 * errors[0]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.create_model("resnet18", features_only=True)
        self.head = nn.Conv2d(512, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(self.encoder(x)[-1]), x.shape[2:], mode="bilinear")


def test_timm_encoder() -> None:
    model = swap.point_rend(Decoder(), fine=["encoder.layer1", "encoder.layer2"], coarse="head", **FEW).eval()
    assert model.point_rend.point_head.in_channels == 64 + 128
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        *_, fine, next_, _, top = model.encoder(x)
        torch.testing.assert_close(model(x), model.point_rend([fine, next_], model.head(top), size=(64, 64)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, image: Tensor, shift: float = 0.0) -> Any:
            return checkpoint(super().forward, image, shift, use_reentrant=reentrant)

    model = swap.point_rend(Checkpointed(), **NAMES, **FEW)
    image = images().requires_grad_()
    if reentrant:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            model(image)
        return
    model(image).sum().backward()
    assert model.head.weight.grad.any()


def test_sequential() -> None:
    """An `nn.Sequential` calls all its children, but must not call the point head."""
    parts = [nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, CLASSES, 3, 2, 1), nn.Upsample(scale_factor=4, mode="bilinear")]
    model = swap.point_rend(nn.Sequential(*parts), fine="0", coarse="1", **FEW).eval()
    x = images()
    fine = parts[0](x)
    torch.testing.assert_close(model(x), model.point_rend(fine, parts[1](fine), size=(32, 48)))
    assert list(model.state_dict())[:2] == ["0.weight", "0.bias"]


def test_arguments_of_the_host() -> None:
    model, plain = net(), Net()
    plain.load_state_dict(model.state_dict(), strict=False)
    x = images()
    for arguments, keywords in ((x, 2.0), {}), ((), {"image": x, "shift": 2.0}):
        torch.manual_seed(1)
        output = model(*arguments, **keywords, target=labels())
        torch.testing.assert_close(output["out"], plain(x, 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, F64])
def test_dtype(dtype: torch.dtype) -> None:
    model = net(dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for training in (True, False):
        assert model.train(training)(images(dtype=dtype)).dtype == dtype


def test_autocast() -> None:
    model = net()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images())
        loss = F.cross_entropy(output.float(), labels()) + model(images(), target=labels())["loss_point"]
        model.eval()(images())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_device() -> None:
    model = net(device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(images(device="meta")).shape == (2, CLASSES, 32, 48)


def test_new_parameters_are_trainable() -> None:
    model = swap.point_rend(Net().requires_grad_(False), **NAMES)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"point_rend"}
