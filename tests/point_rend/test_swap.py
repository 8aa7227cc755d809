"""Semantic models, torchvision's and others, that become PointRend models."""

from __future__ import annotations

import concurrent.futures
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
import timm
# isort: on

from torchvision.models import segmentation

from paper_layers import point_sample, sample_uncertain_points, swap
from paper_layers.lip import LIPPool2d
from paper_layers.point_rend import PointRendSemantic

F64 = torch.float64
CLASSES = 5
# Points are float32, whatever the maps are.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """An encoder-decoder as one writes it, that returns a map or a dict."""

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


FEW: dict[str, Any] = {"fc_dim": 16, "num_points": 60, "subdivision_num_points": 40}
NAMES: dict[str, Any] = {"fine": ["stem", "body"], "coarse": "head"}


def net(as_dict: bool = False, **factory: Any) -> Any:
    return swap.pointrend(Net(as_dict, **factory), **NAMES, **FEW)


def images(*size: int, **factory: Any) -> Tensor:
    return torch.randn(*(size or (2, 3, 32, 48)), **factory)


def labels(*size: int) -> Tensor:
    return torch.randint(CLASSES, size or (2, 32, 48))


def maps(model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Coarse logits and fine features of a Net, by hand."""
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
        assert swap.pointrend(model, subdivision_num_points=100) is model
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
        expected = model.point_rend(coarse, stages(model, x, stage), size=(32, 48))
    torch.testing.assert_close(actual["out"], expected)
    assert not torch.allclose(actual["out"], plain["out"])
    if aux:
        assert torch.equal(actual["aux"], plain["aux"])

    # The loop of torchvision's reference, which knows nothing of points.
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
    expected = model.point_rend(coarse, features, size=size)
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
    """The map that training gives and the paper's losses for it: at the points, and elsewhere of the coarse map."""
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
    expected = model.point_rend(coarse, features, target)["loss_sem_seg_point"]
    assert list(output) == (["features", "out", "loss_point"] if as_dict else ["out", "loss_point"])
    torch.testing.assert_close(output["out"], plain(x))
    torch.testing.assert_close(output["loss_point"], expected)
    output["loss_point"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_learns_what_the_coarse_map_cannot() -> None:
    """Stripes of a pixel or two, beyond a map of a sixteenth of the pixels."""
    model = swap.pointrend(Net(), **NAMES, fc_dim=32, num_points=256, subdivision_num_points=32 * 32)
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
    model = swap.pointrend(Decoder(), fine=["encoder.layer1", "encoder.layer2"], coarse="head", **FEW).eval()
    assert model.point_rend.point_head.in_channels == 64 + 128
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        *_, fine, next_, _, top = model.encoder(x)
        torch.testing.assert_close(model(x), model.point_rend(model.head(top), [fine, next_], size=(64, 64)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, image: Tensor, shift: float = 0.0) -> Any:
            return checkpoint(super().forward, image, shift, use_reentrant=reentrant)

    model = swap.pointrend(Checkpointed(), **NAMES, **FEW)
    image = images().requires_grad_()
    if reentrant:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            model(image)
        return
    model(image).sum().backward()
    assert model.head.weight.grad.any()


def test_sequential() -> None:
    """Its forward calls all its children."""
    parts = [nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, CLASSES, 3, 2, 1), nn.Upsample(scale_factor=4, mode="bilinear")]
    model = swap.pointrend(nn.Sequential(*parts), fine="0", coarse="1", **FEW).eval()
    x = images()
    fine = parts[0](x)
    torch.testing.assert_close(model(x), model.point_rend(parts[1](fine), fine, size=(32, 48)))
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
    model = swap.pointrend(Net().requires_grad_(False), **NAMES)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"point_rend"}


def test_hooks() -> None:
    model, calls = Net(), []
    for name, module in ("model", model), ("head", model.head):
        module.register_forward_hook(lambda _, args, output, name=name: calls.append((name, output)))
    swap.pointrend(model, **NAMES, **FEW).eval()
    assert calls == []
    output = model(images())
    assert [name for name, _ in calls] == ["head", "model"]
    assert calls[1][1] is output


def test_nothing_is_held() -> None:
    """Of the captured maps, neither after a forward, nor after an error, nor when parts are called by themselves."""
    model = net().eval()

    def held() -> list[int]:
        return [len(tap.outputs) for tap in model._point_rend_taps]

    model(images())
    assert held() == [0, 0, 0]
    model.head(images(1, 12, 4, 4))
    assert held() == [0, 0, 0]
    with pytest.raises(TypeError):
        model(images(), shift="one")
    assert held() == [0, 0, 0]


def test_threads() -> None:
    model = net().eval()
    several = [images(1, 3, 64, 64) for _ in range(16)]
    with torch.no_grad():
        expected = [model(x) for x in several]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            actual = list(pool.map(torch.no_grad()(model), several))
    torch.testing.assert_close(actual, expected)


def test_copies() -> None:
    model, x = net().eval(), images()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    expected = model(x)
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False):
        assert repr(twin) == repr(model)
        assert type(twin) is type(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        torch.testing.assert_close(twin(x), expected)
        model.load_state_dict(twin.state_dict())
    fresh = net().eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), expected)


def test_later_hooks_of_a_pickled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not take the place of ours, though in a new process torch counts hooks from 0."""
    model, x = net().eval(), images()
    data, expected = pickle.dumps(model), model(x)
    (number,) = model.head._forward_hooks
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    twin = pickle.loads(data)
    for _ in range(number + 1):
        twin.head.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize(
    ("as_dict", "ways"),
    [(True, [(False, {}), (True, {})]), (False, [(True, {"target": torch.ones(2, 32, 48, dtype=torch.int64)})])],
)
def test_compile(as_dict: bool, ways: list[tuple[bool, dict[str, Tensor]]]) -> None:
    model, x = net(as_dict), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training, arguments in ways:
        model.train(training)
        state = copy.deepcopy(model.state_dict())
        results, grads = [], []
        for one in model, compiled:
            model.load_state_dict(state)
            torch.manual_seed(1)
            results.append(one(x, **arguments))
            tensors = list(results[-1].values()) if isinstance(results[-1], dict) else [results[-1]]
            loss = sum(tensor.square().mean() for tensor in tensors)
            grads.append(torch.autograd.grad(loss, list(model.parameters())))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*grads)
    assert all(tap.outputs == {} for tap in model._point_rend_taps)


def test_compiled_before() -> None:
    model, x = Net().eval(), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    old = compiled(x)
    assert swap.pointrend(compiled, **NAMES, **FEW) is compiled
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), old)


def test_export() -> None:
    model, x = net().eval(), images()
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_ddp() -> None:
    model = net()
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        F.cross_entropy(parallel(images()), labels()).backward()
        output = parallel(images(), target=labels())
        (output["loss_point"] + F.cross_entropy(output["out"], labels())).backward()
    assert all(p.grad.count_nonzero() for p in model.parameters())


def test_idempotent() -> None:
    model = net()
    modules = list(model.modules())
    assert swap.pointrend(model) is model
    assert swap.pointrend(model, **NAMES) is model
    assert list(model.modules()) == modules
    assert len(model.head._forward_hooks) == 1


@pytest.mark.parametrize("first", [True, False])
def test_with_lip(first: bool) -> None:
    model = Net()
    if first:
        swap.strided_conv(swap.pooling(model))
    swap.pointrend(model, **NAMES, **FEW)
    if not first:
        swap.strided_conv(swap.pooling(model))
    assert type(model.body[0]) is LIPPool2d
    assert model(images()).shape == (2, CLASSES, 32, 48)


def lraspp() -> nn.Module:
    return segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)


def test_inner_hosts_and_filter() -> None:
    model: Any = nn.ModuleDict({"a": lraspp(), "b": lraspp(), "net": Net()})
    swap.pointrend(model, filter_fn=lambda module, name: name == "b", **FEW)
    assert [hasattr(model[key], "point_rend") for key in model] == [False, True, False]
    swap.pointrend(model)
    assert [hasattr(model[key], "point_rend") for key in model] == [True, True, False]
    swap.pointrend(model["net"], **NAMES)
    assert model["net"](images()).shape == (2, CLASSES, 32, 48)


def test_fine_of_torchvision() -> None:
    model: Any = swap.pointrend(lraspp(), fine=["backbone.1", "backbone.3"])
    assert model.point_rend.point_head.in_channels == 16 + 24


def test_example_input() -> None:
    model: Any = swap.pointrend(Net(), **NAMES, example_input=(images(), 2.0))
    assert model.point_rend.point_head.in_channels == 8 + 12


class Two(Net):
    def forward(self, image: Tensor) -> Any:
        return super().forward(image), image


class Same(Net):
    def forward(self, image: Tensor) -> Any:
        return self.head(self.body(self.stem(image)))


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (Net, {}, ValueError, r"at least one torchvision FCN, DeepLabV3, LRASPP or Mask R-CNN .*got none in Net"),
        (Net, {"coarse": "head"}, ValueError, r"fine: expected names of modules in Net, got None"),
        (Net, {"coarse": "head", "fine": []}, ValueError, r"fine: expected names of modules in Net, got \[\]"),
        (Net, {"coarse": "had", "fine": "stem"}, ValueError, r"coarse: .*\(it has stem, body, head\), got 'had'"),
        (Net, {"coarse": "head", "fine": "stem.9"}, ValueError, r"fine: expected the name of a module.*got 'stem\.9'"),
        (Net, {"coarse": "head", "fine": ""}, ValueError, r"fine: expected the name of a module.*got ''"),
        (Net, {"coarse": "head", "fine": [3]}, TypeError, r"fine: expected the name of a module, got 3"),
        (Net, {"coarse": "body", "fine": "stem"}, ValueError, r"coarse: expected 5 channels.*got 12"),
        (Two, NAMES, ValueError, r"the output of Two: expected a map.*got tuple"),
        (Same, NAMES, ValueError, r"coarse: expected a map smaller than .*\(28, 28\), got \(28, 28\)"),
        (Net, {**NAMES, "example_input": torch.zeros(2, 4, 9, 9)}, ValueError, r"example_input: .*Net.*RuntimeError"),
        (Net, {**NAMES, "points": 3}, TypeError, r"unexpected keyword argument 'points'"),
        (Net, {**NAMES, "num_points": 0}, ValueError, r"num_points: expected at least 1, got 0"),
        (Net, {**NAMES, "filter_fn": lambda module, name: False}, ValueError, r"filter_fn accepts \(1 without it\)"),
        (str, {}, TypeError, r"model: expected a Module, got str"),
    ],
)
def test_bad_input(kind: Any, arguments: dict[str, Any], error: type, message: str) -> None:
    model = kind()
    with pytest.raises(error, match=message):
        swap.pointrend(model, **arguments)
    assert type(model) is kind
    assert not hasattr(model, "point_rend")
    if kind is not str:
        assert not any(module._forward_hooks for module in model.modules())


def test_output_that_is_no_map() -> None:
    model = Net()
    model.body = nn.Sequential(model.body, nn.Flatten(2), nn.Unflatten(2, (14, 56)))
    with pytest.raises(ValueError, match=r"fine: expected a map \(N, C, H, W\).*float32 of shape \(2, 12, 784\)"):
        swap.pointrend(model, fine="body.1", coarse="head")
    model.unused = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match=r"fine: expected a map \(N, C, H, W\).*NoneType"):
        swap.pointrend(model, fine="unused", coarse="head")


def test_no_stage_of_stride_four() -> None:
    model: Any = lraspp()
    model.backbone.pop("2")
    model.backbone["3"] = nn.Conv2d(16, 24, 1, stride=4)
    with pytest.raises(ValueError, match=r"fine: .* nothing of stride 4, got None"):
        swap.pointrend(model)


def test_forward_on_the_object() -> None:
    model = Net()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="model: expected the forward of its class"):
        swap.pointrend(model, **NAMES)


def test_target_of_the_wrong_dtype() -> None:
    model = net()
    with pytest.raises(TypeError, match="target: expected an int64 Tensor"):
        model(images(), target=labels().float())
