"""Properties of both surgeries."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from paper_layers import swap
from paper_layers.lip import LIPConv2d, LIPPool2d
from tests.lip.surgeries import BOTH, Surgery, count, images, sequential


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
    assert calls == (["pre"] if surgery is swap.pooling else [])  # Pre-hooks run, since they may change a pool's input.
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
    """One pool and one convolution, each registered twice and also held in a plain list."""

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
