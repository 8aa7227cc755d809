"""The published networks and checkpoints against functional copies of the official code, with its keys."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers.lip import (
    LazyLIPPool2d,
    LIPBottleneck,
    LIPDenseNet,
    LIPPool2d,
    LIPResNet,
    LIPTransition,
    LogitHead,
    lip_densenet121,
    lip_resnet50,
    lip_resnet101,
    load_official,
)


class Official:
    """The official networks as functions of a state dict; the first run creates its entries."""

    def __init__(self, device: str = "cpu"):
        self.state: dict[str, Tensor] = {}
        self.device = device

    def get(self, key: str, *shape: int, positive: bool = False) -> Tensor:
        if key not in self.state:
            value = torch.randn(shape, dtype=torch.float64, device=self.device) / math.sqrt(
                max(1, math.prod(shape[1:]))
            )
            self.state[key] = value.abs() + 0.5 if positive else value
        return self.state[key]

    def conv(self, x: Tensor, key: str, out: int, size: int = 1, stride: int = 1) -> Tensor:
        weight = self.get(f"{key}.weight", out, x.shape[1], size, size)
        return F.conv2d(x, weight, stride=stride, padding=size // 2)

    def batch_norm(self, x: Tensor, key: str) -> Tensor:
        c = x.shape[1]
        weight, bias = self.get(f"{key}.weight", c, positive=True), self.get(f"{key}.bias", c)
        mean, var = self.get(f"{key}.running_mean", c), self.get(f"{key}.running_var", c, positive=True)
        return F.batch_norm(x, mean, var, weight, bias)

    def conv_norm(self, x: Tensor, conv: str, norm: str, out: int, size: int = 1) -> Tensor:
        y = self.conv(x, conv, out, size)
        return F.instance_norm(y, weight=self.get(f"{norm}.weight", out), bias=self.get(f"{norm}.bias", out))

    def pool(self, x: Tensor, logit: Tensor, *geometry: int) -> Tensor:
        weight = (12 * torch.sigmoid(logit)).exp()
        return F.avg_pool2d(x * weight, *geometry) / F.avg_pool2d(weight, *geometry)

    def shared(self, x: Tensor, key: str, width: int) -> Tensor:
        x = self.conv_norm(x, f"{key}.conv1", f"{key}.bn1", width).relu()
        return self.conv_norm(x, f"{key}.conv2", f"{key}.bn2", width, 3).relu()

    def linear(self, x: Tensor, key: str, out: int) -> Tensor:
        return F.linear(x.mean((2, 3)), self.get(f"{key}.weight", out, x.shape[1]), self.get(f"{key}.bias", out))

    def block(self, x: Tensor, p: str, planes: int, strided: bool, width: int) -> Tensor:
        y = self.batch_norm(self.conv(x, f"{p}conv1", planes), f"{p}bn1").relu()
        if strided:
            shared = self.shared(x, f"{p}bottleneck_shared.logit", width)
            lip, post = f"{p}downsample.lip.postprocessing", f"{p}conv2.0.postprocessing"
            y = self.pool(y, self.conv_norm(shared, f"{post}.conv", f"{post}.bn", planes), 3, 2, 1)
            y = self.conv(y, f"{p}conv2.1", planes)
            x = self.pool(x, self.conv_norm(shared, f"{lip}.conv", f"{lip}.bn", x.shape[1]), 3, 2, 1)
            x = self.batch_norm(self.conv(x, f"{p}downsample.conv", 4 * planes), f"{p}downsample.bn")
        else:
            y = self.conv(y, f"{p}conv2", planes, 3)
            if x.shape[1] != 4 * planes:
                x = self.batch_norm(self.conv(x, f"{p}downsample.0", 4 * planes), f"{p}downsample.1")
        y = self.batch_norm(self.conv(self.batch_norm(y, f"{p}bn2").relu(), f"{p}conv3", 4 * planes), f"{p}bn3")
        return (y + x).relu()

    def resnet(self, x: Tensor, layers: tuple[int, ...], num_classes: int, width: int) -> Tensor:
        x = self.batch_norm(self.conv(x, "conv1", 64, 7, 2), "bn1").relu()
        x = self.pool(x, self.conv_norm(x, "maxpool.logit.conv", "maxpool.logit.bn", 64, 3), 3, 2, 1)
        for stage, blocks in enumerate(layers):
            for i in range(blocks):
                x = self.block(x, f"layer{stage + 1}.{i}.", 64 * 2**stage, stage > 0 and i == 0, width)
        return self.linear(x, "fc", num_classes)

    def transition(self, x: Tensor, p: str, width: int) -> Tensor:
        x = self.conv(self.batch_norm(x, f"{p}norm").relu(), f"{p}conv", x.shape[1] // 2)
        logit = self.shared(x, f"{p}pool.logit", width)
        return self.pool(x, self.conv_norm(logit, f"{p}pool.logit.conv3", f"{p}pool.logit.bn3", x.shape[1]), 2, 2, 0)

    def densenet(
        self, x: Tensor, blocks: tuple[int, ...], growth: int, first: int, num_classes: int, width: int
    ) -> Tensor:
        x = self.batch_norm(self.conv(x, "features.conv0", first, 7, 2), "features.norm0").relu()
        x = self.pool(x, self.conv_norm(x, "features.pool0.logit.conv1", "features.pool0.logit.bn1", first, 3), 3, 2, 1)
        for block, layers in enumerate(blocks, 1):
            for layer in range(1, layers + 1):
                p = f"features.denseblock{block}.denselayer{layer}."
                y = self.conv(self.batch_norm(x, f"{p}norm1").relu(), f"{p}conv1", 4 * growth)
                x = torch.cat([x, self.conv(self.batch_norm(y, f"{p}norm2").relu(), f"{p}conv2", growth, 3)], 1)
            if block < len(blocks):
                x = self.transition(x, f"features.transition{block}.", width)
        return self.linear(self.batch_norm(x, "features.norm5").relu(), "classifier", num_classes)


Case = tuple[Callable[[], nn.Module], Callable[[Official, Tensor], Tensor], tuple[int, ...]]
_F64 = torch.float64
WHOLE: dict[str, Case] = {
    "resnet": (
        lambda: LIPResNet((1, 2, 1, 1), 5, hidden_channels=8, dtype=_F64),
        lambda o, x: o.resnet(x, (1, 2, 1, 1), 5, 8),
        (2, 3, 64, 70),
    ),
    "densenet": (
        lambda: LIPDenseNet((2, 3, 1), 4, 8, num_classes=5, hidden_channels=6, dtype=_F64),
        lambda o, x: o.densenet(x, (2, 3, 1), 4, 8, 5, 6),
        (2, 3, 64, 70),
    ),
    "resnet block": (
        lambda: LIPBottleneck(16, 8, 6, dtype=_F64),
        lambda o, x: o.block(x, "", 8, True, 6),
        (2, 16, 9, 8),
    ),
    "transition": (lambda: LIPTransition(16, 8, 6, dtype=_F64), lambda o, x: o.transition(x, "", 6), (2, 16, 9, 8)),
}


def _projection(official: Official, x: Tensor) -> Tensor:
    logit = official.conv_norm(x, "postprocessing.conv", "postprocessing.bn", 6)
    return official.pool(x, logit, 3, 2, 1)


def _simplified(conv: str, norm: str) -> Callable[[Official, Tensor], Tensor]:
    return lambda o, x: o.pool(x, o.conv_norm(x, f"logit.{conv}", f"logit.{norm}", 6, 3), 3, 2, 1)


def _bottleneck(conv: str, norm: str) -> Callable[[Official, Tensor], Tensor]:
    return lambda o, x: o.pool(x, o.conv_norm(o.shared(x, "logit", 5), conv, norm, 6), 3, 2, 1)


POOLS: dict[str, tuple[str, Callable[[Official, Tensor], Tensor]]] = {
    "projection": ("projection", _projection),
    "simplified, ResNet's names": ("simplified", _simplified("conv", "bn")),
    "simplified, DenseNet's names": ("simplified", _simplified("conv1", "bn1")),
    "bottleneck, ResNet's names": ("bottleneck", _bottleneck("postprocessing.conv", "postprocessing.bn")),
    "bottleneck, DenseNet's names": ("bottleneck", _bottleneck("logit.conv3", "logit.bn3")),
}


@pytest.mark.parametrize("name", WHOLE)
def test_networks_and_blocks_equal_the_official_ones(name: str) -> None:
    make, run, shape = WHOLE[name]
    official, x = Official(), torch.randn(shape, dtype=_F64)
    expected = run(official, x)
    module = load_official(make(), official.state).eval()
    torch.testing.assert_close(module(x), expected)
    assert sum(p.numel() for p in module.parameters()) == sum(
        value.numel() for key, value in official.state.items() if "running" not in key
    )


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("lazy", [False, True])
def test_single_pools_equal_the_official_ones(name: str, lazy: bool) -> None:
    form, run = POOLS[name]
    official, x = Official(), torch.randn(2, 6, 9, 8, dtype=_F64)
    expected = run(official, x)
    options = {"logit": form, "hidden_channels": 5, "dtype": _F64}
    pool = LazyLIPPool2d(**options) if lazy else LIPPool2d(6, **options)
    torch.testing.assert_close(load_official(pool, official.state)(x), expected)


def _published(name: str, width: int = 128) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a published network and its official state dict, both on the meta device."""
    official, x = Official("meta"), torch.empty(1, 3, 64, 64, dtype=_F64, device="meta")
    if name == "densenet121":
        official.densenet(x, (6, 12, 24, 16), 32, 64, 1000, width)
        return lip_densenet121(hidden_channels=width, device="meta"), official.state
    make, layers = {"resnet50": (lip_resnet50, (3, 4, 6, 3)), "resnet101": (lip_resnet101, (3, 4, 23, 3))}[name]
    official.resnet(x, layers, 1000, width)
    return make(hidden_channels=width, device="meta"), official.state


@pytest.mark.parametrize(
    ("name", "width", "count"),
    [
        ("resnet50", 64, 23_244_968),
        ("resnet50", 128, 23_864_232),
        ("resnet50", 256, 25_766_312),
        ("resnet101", 128, 42_856_360),
        ("densenet121", 64, 8_243_688),
        ("densenet121", 128, 8_690_920),
        ("densenet121", 256, 10_248_936),
    ],
)
def test_published_sizes_and_keys(name: str, width: int, count: int) -> None:
    model, state = _published(name, width)
    assert sum(p.numel() for p in model.parameters()) == count
    zeros = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}
    load_official(model.to_empty(device="cpu"), zeros)


@pytest.fixture
def official() -> dict[str, Tensor]:
    official = Official()
    official.block(torch.randn(2, 16, 9, 8, dtype=_F64), "", 8, True, 6)
    return official.state


def test_wrappers_and_paths(official: dict[str, Tensor], tmp_path: Path) -> None:
    parallel = {f"module.{key}": value for key, value in official.items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 90, "state_dict": parallel}, path)
    expected = load_official(LIPBottleneck(16, 8, 6), official).state_dict()
    for form in (parallel, {"epoch": 90, "state_dict": official}, path, str(path)):
        actual = load_official(LIPBottleneck(16, 8, 6), form).state_dict()
        assert all(torch.equal(actual[key], value) for key, value in expected.items())
    counted = {**official, "bn1.num_batches_tracked": torch.tensor(7)}
    assert load_official(LIPBottleneck(16, 8, 6), counted).bn1.num_batches_tracked == 7


def _without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("conv2.0.postprocessing.bn.bias"), "missing pool.logit.norm.bias"),
        (lambda s: {**s, "conv4.weight": s["conv1.weight"]}, "unexpected conv4.weight"),
        (lambda s: {**s, "epoch": 3}, "unexpected epoch"),
        (lambda s: {**s, "pool.logit.conv.weight": s["conv2.0.postprocessing.conv.weight"]}, "unexpected pool.logit"),
        (lambda s: {**s, "bn1.bias": torch.zeros(3)}, r"bn1.bias of shape \(3,\) where bn1.bias has \(8,\)"),
        (lambda s: {}, "missing stem.conv1.weight"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_loaded(
    official: dict[str, Tensor], change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    block = LIPBottleneck(16, 8, 6)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=f"state_dict: expected .* LIPBottleneck, got .*{message}"):
        load_official(block, change(official))
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())


def test_a_checkpoint_is_a_mapping_or_a_path() -> None:
    for wrong in (3, [], {"state_dict": None}):
        with pytest.raises(TypeError, match="state_dict: expected a mapping or a path, got"):
            load_official(LIPPool2d(6), wrong)


def _poolings(model: nn.Module, x: Tensor) -> Iterator[tuple[LIPPool2d, Tensor, Tensor]]:
    seen: list[tuple[LIPPool2d, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
        for module in model.modules()
        if isinstance(module, LIPPool2d)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return iter(seen)


SMALL: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "resnet": (lambda **options: LIPResNet((1, 1, 1, 1), 5, hidden_channels=8, **options), 7),
    "densenet": (lambda **options: LIPDenseNet((2, 3, 1), 4, 8, num_classes=5, hidden_channels=6, **options), 3),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("zero_init", ["norm", "conv"])
def test_fresh_networks_pool_by_averages(name: str, zero_init: str) -> None:
    make, count = SMALL[name]
    model = make(zero_init=zero_init)
    poolings = list(_poolings(model, torch.randn(2, 3, 64, 64)))
    assert len(poolings) == count
    for pool, x, out in poolings:
        geometry = (pool.kernel_size, pool.stride, pool.padding)
        torch.testing.assert_close(out, F.avg_pool2d(x, *geometry, count_include_pad=False))


def test_zeroed_norms_have_gradients_of_the_networks_scale_and_zeroed_convolutions_do_not() -> None:
    x, ratio = torch.randn(4, 3, 64, 64), {}
    for zero_init in ("norm", "conv"):
        torch.manual_seed(0)
        model = LIPResNet((1, 1, 1, 1), 5, hidden_channels=8, zero_init=zero_init)
        F.cross_entropy(model(x), torch.arange(4)).backward()
        logit = [p.grad for n, p in model.named_parameters() if re.search(r"\b(logit|stem)\.", n)]
        rest = [p.grad for n, p in model.named_parameters() if not re.search(r"\b(logit|stem)\.", n)]
        ratio[zero_init] = nn.utils.get_total_norm(logit) / nn.utils.get_total_norm(rest)
    assert 0 < ratio["norm"] < 1
    assert ratio["conv"] > 30 * ratio["norm"]


@pytest.mark.parametrize("name", SMALL)
def test_host_init_and_reset_on_meta(name: str) -> None:
    make, _ = SMALL[name]
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(-3)
    model.reset_parameters()
    mode = "fan_out" if name == "resnet" else "fan_in"
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.weight[0].numel() if mode == "fan_in" else module.weight[:, 0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.25)
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.running_var, torch.ones_like(module.bias))
            assert not module.running_mean.any()
            assert not module.bias.any()
            assert module.num_batches_tracked == 0
        elif isinstance(module, LogitHead):
            assert not module.norm.weight.any()
            assert not module.norm.bias.any()
        elif isinstance(module, nn.Linear):
            assert not module.bias.any()
            assert 0 < module.weight.abs().max() < 1
    last = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()}
    assert last == ({f"layer{i}.0.bn3" for i in range(1, 5)} if name == "resnet" else set())


@pytest.mark.parametrize("name", SMALL)
def test_trains_in_bfloat16_and_channels_last(name: str) -> None:
    model = SMALL[name][0]().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 40, 40).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet block", "transition"])
def test_blocks_compile(name: str) -> None:
    make, run, shape = WHOLE[name]
    official, x = Official(), torch.randn(shape, dtype=_F64)
    run(official, x)
    block = load_official(make(), official.state)
    twin = copy.deepcopy(block)
    actual = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, twin(x))
    actual.square().sum().backward()
    twin(x).square().sum().backward()
    for p, q in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_distributed(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = SMALL["densenet"][0]()
        twin = copy.deepcopy(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        x = torch.randn(2, 3, 64, 64)
        parallel(x).sum().backward()
        twin(x).sum().backward()
        for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_layers_must_be_four() -> None:
    with pytest.raises(ValueError, match=r"layers: expected four numbers of blocks, got \(2, 2\)"):
        LIPResNet((2, 2))
