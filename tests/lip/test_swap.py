"""Surgery on finished models: torchvision's, timm's and hand-written ones."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
import timm
import torchvision
# isort: on

from paper_layers import swap
from paper_layers.lip import LIPPool2d
from paper_layers.swap import LIPConv2d

Surgery = Callable[..., nn.Module]
BOTH = pytest.mark.parametrize("surgery", [swap.pooling, swap.strided_conv])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def sequential(**factory: Any) -> nn.Sequential:
    """A host with one thing for each surgery, a norm with statistics and a dropout."""
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, **factory)
    return nn.Sequential(conv, nn.BatchNorm2d(8, **factory), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2))


def images(*size: int, **factory: Any) -> Tensor:
    return torch.randn(*(size or (2, 3, 16, 16)), **factory)


def count(model: nn.Module, *kinds: type) -> int:
    return sum(type(module) in kinds for module in model.modules())


def averaging(model: nn.Module) -> nn.Module:
    """The host by hand: average pools without padding for all pools, as a fresh LIP computes."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.MaxPool2d, nn.AvgPool2d):
                average = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode, False)
                setattr(parent, name, average)
    return model


def striding(model: nn.Module) -> nn.Module:
    """The host by hand: strided convolutions of stride 2 as convolution and average pool."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and child.stride == (2, 2):
                child.stride = (1, 1)
                setattr(parent, name, nn.Sequential(child, nn.AvgPool2d(3, 2, 1, count_include_pad=False)))
    return model


HOSTS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "torchvision-resnet18": (torchvision.models.resnet18, 1, 7),
    "torchvision-resnet50": (torchvision.models.resnet50, 1, 7),
    "torchvision-densenet121": (torchvision.models.densenet121, 4, 1),
    "timm-resnet18": (lambda: timm.create_model("resnet18"), 1, 7),
    "timm-resnet26d": (lambda: timm.create_model("resnet26d"), 4, 4),
    "sequential": (sequential, 1, 1),
}


@pytest.mark.parametrize("host", HOSTS)
@BOTH
def test_hosts(host: str, surgery: Surgery) -> None:
    build, pools, convs = HOSTS[host]
    model = build().eval()
    old = {name: (p, p.clone()) for name, p in model.named_parameters()}
    by_hand = (averaging if surgery is swap.pooling else striding)(copy.deepcopy(model))

    assert surgery(model, hidden_channels=16) is model
    if surgery is swap.pooling:
        assert count(model, LIPPool2d) == pools
        assert count(model, nn.MaxPool2d, nn.AvgPool2d) == 0
    else:
        assert count(model, LIPConv2d) == convs
        assert not any(type(m) is nn.Conv2d and max(m.stride) > 1 for m in model.modules())
    new = dict(model.named_parameters())
    assert all(new[name] is parameter and torch.equal(parameter, value) for name, (parameter, value) in old.items())

    x = images(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(x), rtol=1e-4, atol=1e-4)
    output = model.train()(x)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(new[name].grad.count_nonzero() for name in new.keys() - old.keys())


def test_detector() -> None:
    """The backbone runs before the data-dependent part that the meta device cannot run."""
    build = torchvision.models.detection.maskrcnn_resnet50_fpn
    model = build(weights=None, weights_backbone=None, min_size=64, max_size=64)
    swap.pooling(model.backbone, logit="simplified", filter_fn=lambda module, name: name == "body.maxpool")
    swap.strided_conv(model.backbone, logit="projection")
    assert count(model, LIPPool2d) == 8
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    }
    loss = sum(model([torch.rand(3, 64, 64)], [target]).values())
    loss.backward()
    assert model.backbone.body.maxpool.logit.norm.weight.grad.count_nonzero()
    with torch.no_grad():
        assert set(model.eval()([torch.rand(3, 64, 64)])[0]) == {"boxes", "labels", "scores", "masks"}


def test_segmentation() -> None:
    build = torchvision.models.segmentation.deeplabv3_resnet50
    model = swap.pooling(swap.strided_conv(build(weights=None, weights_backbone=None), "projection"), "simplified")
    assert model(images(2, 3, 64, 64))["out"].shape == (2, 21, 64, 64)


def test_timm_layer() -> None:
    model = timm.create_model("resnet50", aa_layer=LIPPool2d)
    assert swap.pooling(model) is model
    assert model(images(2, 3, 64, 64)).shape == (2, 1000)


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


sizes = st.integers(1, 5)


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 23), st.integers(1, 23)),
    st.tuples(sizes, sizes),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)) | st.just("valid"),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_conv_output_size(size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
    pads = (0, 0) if padding == "valid" else padding
    reach = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(size, pads, dilation, kernel, strict=True)]
    assume(min(reach) >= 1 and stride != (1, 1))
    conv = nn.Conv2d(1, 2, kernel, stride, padding, dilation, dtype=torch.float64)
    x = images(1, 1, *size, dtype=torch.float64)
    old = conv(x)
    assert swap.strided_conv(conv, "identity")(x).shape == old.shape
    # Each window is centred where the strided convolution was computed: importance there alone gives it back.
    grid = torch.full(reach, -1e4, dtype=torch.float64)
    grid[:: stride[0], :: stride[1]] = 1e4
    conv.pool.logit = _Fixed(grid)
    torch.testing.assert_close(conv(x), old)


class _Fixed(nn.Module):
    def __init__(self, logit: Tensor):
        super().__init__()
        self.register_buffer("value", logit)

    def forward(self, input: Tensor) -> Tensor:
        return self.value.expand(*input.shape[:-3], 1, -1, -1)


@pytest.mark.parametrize(
    ("stride", "kernel"),
    [(2, (3, 3)), (3, (3, 3)), (4, (5, 5)), (5, (5, 5)), ((2, 1), (3, 1)), ((1, 4), (1, 5))],
)
def test_conv_window(stride: Any, kernel: Any) -> None:
    pool = swap.strided_conv(nn.Conv2d(3, 8, 3, stride)).pool
    assert (pool.channels, pool.kernel_size, pool.padding) == (8, kernel, tuple(k // 2 for k in kernel))


@pytest.mark.parametrize("options", [{"groups": 4}, {"bias": False}, {"padding_mode": "reflect"}, {"dilation": 2}])
def test_conv_options(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 8, 3, 2, 1, **options)
    dense = copy.deepcopy(conv)
    dense.stride = (1, 1)
    x = images(2, 4, 9, 9)
    expected = F.avg_pool2d(dense(x), 3, 2, 1, count_include_pad=False)
    torch.testing.assert_close(swap.strided_conv(conv)(x), expected)
    assert LIPConv2d(4, 8, 3, 2, 1, **options)(x).shape == expected.shape


@BOTH
def test_live_optimizer(surgery: Surgery) -> None:
    model = sequential()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(images()).square().sum().backward()
    optimizer.step()
    weight = model[0].weight
    surgery(model)
    before = weight.clone()
    model(images()).square().sum().backward()
    optimizer.step()
    assert model[0].weight is weight
    assert not torch.equal(weight, before)
    assert weight in optimizer.state


@BOTH
def test_frozen_host(surgery: Surgery) -> None:
    model = sequential().requires_grad_(False)
    old = set(model.parameters())
    surgery(model)
    assert not any(p.requires_grad for p in old)
    assert all(p.requires_grad for p in set(model.parameters()) - old)


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_training_mode(surgery: Surgery, training: bool) -> None:
    model = sequential().train(training)
    model[1].train(not training)
    surgery(model)
    assert all(m.training == training for name, m in model.named_modules() if name != "1")
    assert model[1].training != training


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(surgery: Surgery, dtype: torch.dtype) -> None:
    for logit in ("bottleneck", nn.InstanceNorm2d(8, affine=True)):
        model = surgery(sequential(dtype=dtype), logit)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(images(dtype=dtype)).dtype == dtype


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@BOTH
@pytest.mark.parametrize("device", ["meta", CUDA])
def test_device(surgery: Surgery, device: str) -> None:
    model = surgery(sequential(device=device))
    assert {p.device.type for p in model.parameters()} == {device}
    assert model(images(device=device)).shape == (2, 8, 4, 4)


@BOTH
def test_hooks(surgery: Surgery) -> None:
    model = sequential()
    target = model[4] if surgery is swap.pooling else model[0]
    calls: list[str] = []
    handles = [
        target.register_forward_pre_hook(lambda *_: calls.append("pre")),
        target.register_forward_hook(lambda *_, **__: calls.append("forward"), with_kwargs=True, always_call=True),
        target.register_full_backward_hook(lambda *_: calls.append("backward")),
        target.register_full_backward_pre_hook(lambda *_: calls.append("backward_pre")),
        target.register_state_dict_pre_hook(lambda *_: calls.append("state_dict_pre")),
    ]
    surgery(model)
    assert calls == (["pre"] if surgery is swap.pooling else [])  # Which may change what a pool sees.
    calls.clear()
    model(images().requires_grad_()).sum().backward()
    assert calls == ["pre", "forward", "backward_pre", "backward"]
    model.state_dict()
    assert calls[4:] == ["state_dict_pre"]
    for handle in handles:
        handle.remove()
    model(images()).sum().backward()
    assert len(calls) == 5


class Shared(nn.Module):
    """One pool and one convolution in two places each, and in places that torch does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList([nn.Conv2d(4, 4, 3, 2, 1), nn.MaxPool2d(2)])
        self.b = nn.ModuleList(self.a)
        self.plain = list(self.a)

    def forward(self, x: Tensor) -> Tensor:
        for layer in itertools.chain(self.a, self.b, self.plain):
            x = layer(x)
        return x


@BOTH
@pytest.mark.parametrize("place", ["a", "b"])
def test_shared_modules(surgery: Surgery, place: str) -> None:
    model = surgery(Shared(), filter_fn=lambda module, name: name.startswith(place))
    assert count(model, LIPPool2d) == 1
    assert all(a is b is c for a, b, c in zip(model.a, model.b, model.plain, strict=True))
    assert model(images(1, 4, 64, 64)).shape == (1, 4, 1, 1)


def test_shared_pool_with_several_channel_counts() -> None:
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), pool, nn.Conv2d(4, 6, 1), pool)
    with pytest.raises(ValueError, match=r"model\.1: expected one number of channels, got 4 and 6"):
        swap.pooling(model)


@BOTH
def test_filter(surgery: Surgery) -> None:
    model = nn.Sequential(sequential(), nn.Conv2d(8, 3, 1), sequential())
    seen: list[tuple[type, str]] = []

    def second(module: nn.Module, name: str) -> bool:
        seen.append((type(module), name))
        return name.startswith("2.")

    surgery(model, filter_fn=second)
    kind, last = (nn.MaxPool2d, "4") if surgery is swap.pooling else (nn.Conv2d, "0")
    assert sorted(seen, key=str) == [(kind, f"0.{last}"), (kind, f"2.{last}")]
    assert count(model[0], LIPPool2d) == 0
    assert count(model[2], LIPPool2d) == 1


@BOTH
def test_idempotent(surgery: Surgery) -> None:
    model = surgery(sequential())
    modules, state = list(model.modules()), {k: v.clone() for k, v in model.state_dict().items()}
    for filter in (None, lambda module, name: type(module) is nn.MaxPool2d or module.stride == (2, 2)):
        assert surgery(model, filter_fn=filter) is model
    assert list(model.modules()) == modules
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_both_surgeries() -> None:
    model = swap.pooling(swap.strided_conv(sequential()))
    assert [type(m) for m in model] == [LIPConv2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout, LIPPool2d]
    assert "LIPConv2d(\n    3, 8, kernel_size=(3, 3), stride=(2, 2)" in repr(model)
    assert "stride=(2, 2), padding=(1, 1), logit='bottleneck'" in repr(model)
    assert model(images()).shape == (2, 8, 4, 4)


def test_root() -> None:
    x = images()
    pool = swap.pooling(nn.AvgPool2d(2, ceil_mode=True), "projection", example_input=x)
    assert type(pool) is LIPPool2d
    assert (pool.channels, pool.form) == (3, "projection")
    conv = swap.strided_conv(nn.Conv2d(3, 4, 1, 2))
    assert type(conv) is LIPConv2d
    assert list(conv.state_dict())[:2] == ["weight", "bias"]


class Branching(nn.Module):
    """Draws random numbers on the CPU and in Python, keeps an attribute, calls by keyword."""

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


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm() -> None:
    """Its hook writes a tensor attribute that is no parameter and not a leaf."""
    model = sequential()
    model[0] = torch.nn.utils.weight_norm(model[0])
    model(images())
    swap.strided_conv(swap.pooling(model))(images()).sum().backward()
    assert model[0].weight_g.grad is not None


@BOTH
def test_copies(surgery: Surgery) -> None:
    model = surgery(sequential(), "projection").eval()
    x = images()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)
    for twin in twins:
        assert repr(twin) == repr(model)
        torch.testing.assert_close(twin(x), model(x))
    fresh = surgery(sequential(), "projection").eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), model(x))


@BOTH
def test_compile(surgery: Surgery) -> None:
    model, x = sequential().eval(), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    old = model(x)
    graphs = counters["stats"]["unique_graphs"]
    assert surgery(compiled) is compiled
    assert counters["stats"]["unique_graphs"] == graphs > 0
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), old)
    compiled(x).sum().backward()
    assert model[0].weight.grad is not None


@BOTH
def test_export(surgery: Surgery) -> None:
    model, x = surgery(sequential()).eval(), images()
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@BOTH
def test_logit_of_ones_own(surgery: Surgery) -> None:
    own = nn.Conv2d(8, 1, 1)
    model = surgery(nn.Sequential(sequential(), nn.Conv2d(8, 3, 1), sequential()), own)
    copies = [m.logit for m in model.modules() if type(m) is LIPPool2d]
    assert len({own, *copies}) == 3
    assert all(torch.equal(m.weight, own.weight) for m in copies)
    model = surgery(sequential(), torch.zeros_like)
    assert count(model, LIPPool2d) == 1
    assert len(list(model.parameters())) == 4
    assert model(images()).shape == (2, 8, 4, 4)


class MyMaxPool(nn.MaxPool2d):
    pass


@BOTH
def test_nothing_to_swap(surgery: Surgery) -> None:
    wanted = r"nn\.MaxPool2d or nn\.AvgPool2d" if surgery is swap.pooling else r"strided nn\.Conv2d"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), MyMaxPool(2), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ValueError, match=f"model: expected at least one {wanted}.* to swap, got none in Sequential"):
        surgery(model)
    with pytest.raises(ValueError, match=r"that filter_fn accepts \(1 without it\), got none"):
        surgery(sequential(), filter_fn=lambda module, name: False)
    with pytest.raises(TypeError, match="model: expected a Module, got str"):
        surgery("resnet50")


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


@BOTH
def test_bad_arguments_change_nothing(surgery: Surgery) -> None:
    model = sequential()
    with pytest.raises(ValueError, match="logit: expected one of"):
        surgery(model, "softmax")
    with pytest.raises(ValueError, match="hidden_channels"):
        surgery(model, hidden_channels=0)
    target = model[4] if surgery is swap.pooling else model[0]
    target.forward = lambda x: x
    with pytest.raises(ValueError, match=r"model\.[04]: expected the forward of its class"):
        surgery(model)
    assert count(model, LIPPool2d) == 0
    assert model[0].stride == (2, 2)
