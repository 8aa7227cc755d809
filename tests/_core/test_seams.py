"""Surgeries on models as users have them: hooked, wrapped, in training mode, with attributes of their own."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.fx.experimental.optimization import fuse
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
import timm
import torchvision
from timm.utils.model import reparameterize_model
# isort: on

from paper_layers import LIPPool2d, swap
from paper_layers.swap import LIPConv2d


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def sequential() -> nn.Sequential:
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 1))


SWAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pooling": swap.pooling,
    "strided_conv": swap.strided_conv,
    "split_batch_norm": swap.split_batch_norm,
    "big_bigan": lambda model: swap.big_bigan(model, 8, hidden_features=8, depth=2),
}


DETECTION = torchvision.models.detection


@pytest.mark.parametrize("given", [False, True])
def test_detectors_in_training_mode(given: bool) -> None:
    build = DETECTION.fasterrcnn_resnet50_fpn if given else DETECTION.retinanet_resnet50_fpn
    model = build(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64).train()
    frozen = model.backbone.body.layer1.eval()
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    example = ([torch.rand(3, 64, 64)], targets) if given else None
    swap.pooling(model, "projection", example_input=example)
    assert model.backbone.body.maxpool.channels == 64
    assert model.training
    assert model.backbone.body.maxpool.training
    assert not frozen.training
    assert torch.stack(list(model([torch.rand(3, 64, 64)], targets).values())).isfinite().all()


def test_input_size_that_timm_tells() -> None:
    model = timm.create_model("test_vit")
    model.last = nn.AvgPool2d(2)  # Reached only by an image of 160 x 160.

    class Pooled(type(model)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            self.last(super().forward_features(x)[:, :8, None, :].mT)
            return x

    model.__class__ = Pooled
    assert isinstance(swap.pooling(model, "identity").last, LIPPool2d)


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def fully_sharded(model: nn.Module) -> Any:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def part_of(model: nn.Module) -> nn.Module:
    return nn.Sequential(*sharded(model))


@pytest.mark.usefixtures("one_process")
def test_a_strided_convolution_is_sharded_and_evaluated() -> None:
    model = swap.strided_conv(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2)))
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    torch.testing.assert_close(sharded(model).eval()(x), expected)
    assert model.train()(x).sum().backward() is None
    assert model.eval()(x).shape == expected.shape


WRAPS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "DataParallel": (DataParallel, "DataParallel"),
    "DDP": (DistributedDataParallel, "DistributedDataParallel"),
    "DDP inside": (lambda model: nn.Sequential(DistributedDataParallel(model)), "model.0: .*DistributedDataParallel"),
    "FSDP2": (sharded, "FSDPModule"),
    "part of FSDP2": (part_of, "model.0: .*DTensors"),
    "FSDP1": (fully_sharded, "FullyShardedDataParallel"),
    "part of FSDP1": (lambda model: nn.Sequential(*fully_sharded(model).module), "model.0: .*FullyShardedDataParallel"),
    "script": (torch.jit.script, "scripted"),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", SWAPS)
@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore")
def test_wrapped_models_are_refused(wrap: str, name: str) -> None:
    build, message = WRAPS[wrap]
    model = build(sequential())
    before = str(model)
    with pytest.raises(ValueError, match=f"{message}.*swap first"):
        SWAPS[name](model)
    assert str(model) == before


class Tagged:
    pass


@pytest.mark.parametrize("name", ["pooling", "strided_conv", "split_batch_norm"])
def test_everything_of_the_users_stays(name: str) -> None:
    model = sequential().eval()
    number = {"pooling": 3, "strided_conv": 0, "split_batch_norm": 1}[name]
    part, tag = model[number], Tagged()
    part.my_tag, part.my_hooks, part.no_weight_decay = tag, [1], True
    part.register_buffer("mine", torch.ones(2), persistent=False)
    part.child, part.own = nn.Linear(2, 2), nn.Parameter(torch.ones(3), requires_grad=False)
    child, own = part.child, part.own
    SWAPS[name](model)
    assert (part.my_tag, part.my_hooks, part.no_weight_decay) == (tag, [1], True)
    assert (part.child, part.own) == (child, own)
    assert (part.mine == 1).all()
    assert not part.own.requires_grad
    assert "mine" not in part.state_dict()
    copy.deepcopy(model)(torch.randn(2, 3, 16, 16))
    if name == "pooling":
        assert not hasattr(part, "return_indices")


def trained(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    return model.eval()


def test_lip_conv_is_no_conv() -> None:
    """It has all that a convolution has, but no tool takes it for one."""
    model = trained(swap.strided_conv(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)), "projection"))
    conv, plain, x = model[0], nn.Conv2d(3, 8, 3), torch.randn(2, 3, 16, 16)
    assert not isinstance(conv, nn.Conv2d)
    assert all(getattr(conv, name) == getattr(plain, name) for name in plain.__constants__ if hasattr(plain, name))
    assert list(conv.state_dict())[:2] == list(plain.state_dict())
    assert repr(conv).startswith("LIPConv2d(\n  3, 8, kernel_size=(3, 3), stride=(2, 2)")
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"weight: .* cannot be\s+folded .*fold first, then swap"):
        fuse_conv_bn_eval(conv, model[1])
    torch.testing.assert_close(model(x), expected)
    fused = fuse(model)
    torch.testing.assert_close(fused(x), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected)
    for assign in (False, True):
        fresh = swap.strided_conv(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)), "projection").eval()
        fresh.load_state_dict(model.state_dict(), assign=assign)
        torch.testing.assert_close(fresh(x), expected)
    conv.train().weight = nn.Parameter(torch.zeros_like(conv.weight))
    assert (conv.weight == 0).all()
    conv.reset_parameters()
    assert conv.weight.count_nonzero()


def test_tied_convolutions() -> None:
    """They are tied again where they come apart, as checkpoints tie them: the values are the same."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1))
    model[1].weight = model[0].weight
    swap.strided_conv(model, "projection").eval()
    x = torch.randn(2, 4, 8, 8)
    expected = model(x)
    model[1].weight = model[0].weight
    model.load_state_dict(model.state_dict(), assign=True)
    model[1].weight = model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    torch.testing.assert_close(model(x), expected)
    model[1].weight = nn.Parameter(model[1].weight.double())
    assert model[1].weight.dtype == torch.double
    with pytest.raises(RuntimeError, match=r"bias: .* To change or tie values, .*in training mode"):
        model[1].bias = nn.Parameter(torch.ones(4))


def test_reparametrising_is_refused() -> None:
    model = trained(swap.strided_conv(timm.create_model("mobileone_s0", num_classes=3), "projection"))
    with pytest.raises(RuntimeError, match=r"reparameterize: expected plain convolutions, got the LIPConv2d model\."):
        reparameterize_model(model)
    copy.deepcopy(model)(torch.randn(1, 3, 32, 32))
    block = timm.create_model("repvgg_a0", num_classes=3)
    reparameterize_model(swap.split_batch_norm(block).eval())


def test_patch_embeddings_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 8, 16, 16))
    swap.strided_conv(model)
    assert [type(m) for m in model] == [nn.Conv2d, LIPConv2d, nn.Conv2d]
    swap.strided_conv(model, filter_fn=lambda module, name: name == "0")
    assert [type(m) for m in model] == [LIPConv2d, LIPConv2d, nn.Conv2d]
    with pytest.raises(
        ValueError, match=r"it has 1 nn.Conv2d with kernel_size equal to stride .*a filter that accepts"
    ):
        swap.strided_conv(timm.create_model("test_vit"))
    assert isinstance(swap.strided_conv(nn.Conv2d(3, 8, 16, 16)), LIPConv2d)


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)


class MyNorm(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("surgery", "model", "message"),
    [
        (swap.strided_conv, lambda: timm.create_model("test_nfnet"), r"it has \d+ ScaledStdConv2d, left alone"),
        (swap.strided_conv, lambda: nn.Sequential(nn.Conv1d(3, 4, 3, 2)), "it has 1 Conv1d, left alone"),
        (
            swap.pooling,
            lambda: nn.Sequential(nn.MaxPool1d(2), nn.AvgPool3d(2)),
            "it has 1 MaxPool1d, 1 AvgPool3d, left",
        ),
        (swap.pooling, lambda: nn.Sequential(Functional()), "it has 1 Functional with calls of max_pool2d"),
    ],
)
def test_errors_name_what_came_close(surgery: Any, model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        surgery(model())


def test_errors_name_the_nearest_modules() -> None:
    model = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3)
    with pytest.raises(ValueError, match=r"coarse: .*got 'clasifier\.4'; close to it are .*classifier\.4"):
        swap.point_rend(model, coarse="clasifier.4", fine="backbone.layer1")
    with pytest.raises(ValueError, match=r"fine: .*close to it are .*backbone\.layer1"):
        swap.point_rend(model, coarse="classifier", fine="layer1")


def test_norms_that_timm_has_split() -> None:
    model = timm.layers.convert_splitbn_model(sequential())
    with pytest.raises(
        ValueError, match=r"model\.1: expected a norm that is not split, got SplitBatchNorm2d of another"
    ):
        swap.split_batch_norm(model)


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 3, 2, 1)

    def forward(self, images: Tensor, scale: float = 1.0, **kwargs: Any) -> Tensor:
        return F.interpolate(self.head(self.body(images * scale)), images.shape[2:])


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def test_signatures_stay() -> None:
    """Tools that drop or name arguments ask for them."""
    images, labels = torch.randn(2, 3, 16, 16), torch.randint(4, (2, 16, 16))
    host = Segmenter()
    model = swap.point_rend(copy.deepcopy(host), fine="body", coarse="head", num_points=20)
    old, new = inspect.signature(host.forward).parameters, inspect.signature(model.forward).parameters
    assert list(new) == ["images", "scale", "target", "kwargs"]
    assert all(new[name] == old[name] for name in old)
    assert set(model(images=images, scale=2.0, target=labels)) == {"out", "loss_point"}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert inspect.signature(twin.forward) == inspect.signature(model.forward)
    batch = {"images": {0: torch.export.Dim("batch", min=2, max=64)}}
    exported = torch.export.export(model.eval(), (images,), dynamic_shapes=batch, strict=False)
    torch.testing.assert_close(exported.module()(images), model(images))

    critic = swap.big_bigan(Critic(), 5, hidden_features=8, depth=2)
    assert list(inspect.signature(critic.forward).parameters) == ["x", "latents"]
    x, z = torch.randn(2, 3, 2, 2), torch.randn(2, 5)
    critic.eval()
    for scores in (critic(x, latents=z), critic(x=x, latents=z), critic(latents=z, x=x)):
        torch.testing.assert_close(scores, critic(x, z))


class Neck(nn.Module):
    """Its `fuse` adds two maps, and folds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.down(x), F.max_pool2d(x, 2))


def test_a_method_that_only_shares_its_name_with_folding_stays() -> None:
    assert swap.strided_conv(Neck(), "projection")(torch.randn(2, 8, 8, 8)).shape == (2, 8, 4, 4)
