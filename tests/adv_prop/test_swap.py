"""Splitting the batch norms of finished models, and making them plain again."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
import timm
import torchvision
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import SyncBatchNormAct, convert_sync_batchnorm
# isort: on

from paper_layers import SplitBatchNorm, SplitBatchNorm1d, SplitBatchNorm2d, SplitBatchNorm3d, swap
from paper_layers.adv_prop import SplitSyncBatchNorm, use_split
from paper_layers.adv_prop._timm import SplitBatchNormAct2d, SplitSyncBatchNormAct
from tests.adv_prop.test_norm import trained


def network(**factory: Any) -> nn.Sequential:
    conv = nn.Conv2d(3, 4, 3, **factory)
    return nn.Sequential(conv, nn.BatchNorm2d(4, **factory), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5, **factory))


def act_norm(channels: int, **options: Any) -> BatchNormAct2d:
    return BatchNormAct2d(channels, act_layer=nn.SiLU, drop_layer=nn.Dropout, **options)


def sync_act_norm(channels: int, **options: Any) -> SyncBatchNormAct:
    device = options.pop("device", None)
    return convert_sync_batchnorm(act_norm(channels, **options)).to(device, options.get("dtype"))


NORMS: dict[str, tuple[Callable[..., Any], type[SplitBatchNorm], tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d, SplitBatchNorm1d, (8, 3)),
    "1d long": (nn.BatchNorm1d, SplitBatchNorm1d, (8, 3, 5)),
    "2d": (nn.BatchNorm2d, SplitBatchNorm2d, (8, 3, 4, 5)),
    "3d": (nn.BatchNorm3d, SplitBatchNorm3d, (8, 3, 2, 4, 3)),
    "sync": (nn.SyncBatchNorm, SplitSyncBatchNorm, (8, 3, 4, 5)),
    "timm": (act_norm, SplitBatchNormAct2d, (8, 3, 4, 5)),
    "timm sync": (sync_act_norm, SplitSyncBatchNormAct, (8, 3, 4, 5)),
}
ALL_NORMS = pytest.mark.parametrize("kind", NORMS)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"eps": 0.1, "momentum": 0.3},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


@ALL_NORMS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_split_is_the_norm_that_was_swapped(kind: str, options: dict[str, Any]) -> None:
    """Training on a batch equals training two copies of the old norm on one half each."""
    build, split_class, shape = NORMS[kind]
    norm = trained(build(3, dtype=torch.float64, **options))
    for dropout in norm.modules():
        if isinstance(dropout, nn.Dropout):
            dropout.p = 0.0
    main, auxiliary = copy.deepcopy(norm), copy.deepcopy(norm)
    assert swap.split_batch_norm(norm) is norm
    assert type(norm) is split_class
    for _ in range(2):
        x = torch.randn(shape, dtype=torch.float64)
        expected = torch.cat([main(x[:4]), auxiliary(x[4:])])
        torch.testing.assert_close(norm(x), expected)
    x = torch.randn(shape, dtype=torch.float64)
    for plain, number in ((main, None), (main, 0), (auxiliary, 1)):
        one = copy.deepcopy(norm).eval()
        if number is None:
            torch.testing.assert_close(one(x), plain.eval()(x))
        else:
            with use_split(one, number):
                torch.testing.assert_close(one(x), plain.eval()(x))
            back = swap.plain_batch_norm(copy.deepcopy(norm), number)
            assert type(back) is type(plain)
            assert list(back.state_dict()) == list(plain.state_dict())
            torch.testing.assert_close(back.state_dict(), plain.state_dict())
            torch.testing.assert_close(back.eval()(x), plain.eval()(x))
            assert vars(back).keys() == vars(plain).keys()


@ALL_NORMS
@pytest.mark.parametrize("place", [("cpu", torch.float64), ("meta", torch.float16)], ids=str)
def test_everything_is_kept(kind: str, place: tuple[str, torch.dtype]) -> None:
    build, _, shape = NORMS[kind]
    device, dtype = place
    norm = trained(build(3, device=device, dtype=dtype)).eval()
    norm.weight.requires_grad_(False)
    norm.bias.grad = torch.ones_like(norm.bias)
    calls: list[str] = []
    norm.register_forward_hook(lambda *_: calls.append("forward"))
    norm.register_buffer("mine", torch.zeros(1, device=device, dtype=torch.int8))
    norm.note = "mine"
    tensors = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    children = dict(norm.named_children())
    swap.split_batch_norm(norm, 3)

    now = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    assert all(now[name] is tensor for name, tensor in tensors.items())
    assert all(norm.get_submodule(name) is child for name, child in children.items())
    assert not norm.training
    assert norm.note == "mine"
    assert device == "meta" or (norm.bias.grad == 1).all()
    for auxiliary in norm.aux_bn:
        assert not auxiliary.training
        assert [p.requires_grad for p in auxiliary.parameters()] == [False, True]
        for name, tensor in itertools.chain(auxiliary.named_parameters(), auxiliary.named_buffers()):
            assert tensor is not tensors[name]
            assert (tensor.device, tensor.dtype) == (tensors[name].device, tensors[name].dtype)
            assert device == "meta" or (
                torch.equal(tensor, tensors[name]) and tensor.data_ptr() != tensors[name].data_ptr()
            )
    norm(torch.ones(shape, device=device, dtype=dtype))
    assert calls == ["forward"]

    weight = norm.aux_bn[1].weight
    assert swap.plain_batch_norm(norm, 2).weight is weight
    assert not norm.training
    assert norm.note == "mine"
    norm(torch.ones(shape, device=device, dtype=dtype))
    assert calls == ["forward"] * 2


def test_key_compatible_with_timm() -> None:
    ours = swap.split_batch_norm(network(), 3)
    theirs = timm.layers.convert_splitbn_model(network(), 3)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())


def test_plain_checkpoint_fills_every_split() -> None:
    model, other = swap.split_batch_norm(network()), network()
    trained(other[1])
    model.load_state_dict(other.state_dict())
    for norm in model[1].split_norms:
        assert torch.equal(norm.running_mean, other[1].running_mean)
        assert torch.equal(norm.weight, other[1].weight)


@pytest.mark.parametrize("fused", [False, True])
def test_eps_and_momentum_of_later_reach_every_split(fused: bool) -> None:
    norm = act_norm(3, dtype=torch.float64) if fused else nn.BatchNorm2d(3, dtype=torch.float64)
    norm = norm.requires_grad_(False)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    swap.split_batch_norm(norm)
    norm.eps, norm.momentum = 0.5, 0.25
    for dropout in norm.modules():
        if isinstance(dropout, nn.Dropout):
            dropout.p = 0.0
    output = norm(x)
    part = x[4:]
    var, mean = torch.var_mean(part, (0, 2, 3), correction=0, keepdim=True)
    normalized = (part - mean) / (var + 0.5).sqrt()
    torch.testing.assert_close(output[4:], nn.functional.silu(normalized) if fused else normalized)
    torch.testing.assert_close(norm.aux_bn[0].running_mean, 0.25 * mean.flatten())
    torch.testing.assert_close(norm.aux_bn[0].running_var, 0.75 + 0.25 * part.var((0, 2, 3)))
    with use_split(norm.eval(), 1):
        normalized = (x - 0.25 * mean) / (norm.aux_bn[0].running_var.view(3, 1, 1) + 0.5).sqrt()
        torch.testing.assert_close(norm(x), nn.functional.silu(normalized) if fused else normalized)


def test_activations_in_place_after_channels_last() -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    # The two layouts round differently, and little is left of these gradients.
    model, x = swap.split_batch_norm(nn.Sequential(*layers).double()), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    twin = copy.deepcopy(model)
    last = model(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    last.square().sum().backward()
    twin(x).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad)


def test_statistics_that_are_no_longer_tracked() -> None:
    norm = nn.BatchNorm2d(3)
    norm.track_running_stats = False
    before = copy.deepcopy(norm.state_dict())
    swap.split_batch_norm(norm)(torch.randn(4, 3, 2, 2))
    assert norm.aux_bn[0].num_batches_tracked == 0
    torch.testing.assert_close(swap.plain_batch_norm(norm).state_dict(), before, rtol=0, atol=0)


def test_twice_is_once() -> None:
    model = swap.split_batch_norm(network(), split_sizes=(0.75, 0.25))
    names = [name for name, _ in model.named_modules()]
    auxiliary = model[1].aux_bn[0]
    assert swap.split_batch_norm(model, split_sizes=(0.75, 0.25)) is model
    assert [name for name, _ in model.named_modules()] == names
    assert model[1].aux_bn[0] is auxiliary
    with pytest.raises(ValueError, match=r"model.1: expected num_splits=2 and split_sizes=\(0.75, 0.25\), as it is"):
        swap.split_batch_norm(model, 3)
    with pytest.raises(ValueError, match=r"model.1: .*got 2 and None"):
        swap.split_batch_norm(model)
    swap.plain_batch_norm(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert swap.plain_batch_norm(model) is model
    fresh = nn.BatchNorm2d(4)
    assert vars(model[1]).keys() == vars(fresh).keys()


def test_synchronised_first_or_an_error() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network(), process_group="mine")
    swap.split_batch_norm(model)
    assert type(model[1]) is SplitSyncBatchNorm
    assert model[1].process_group == "mine"
    swap.plain_batch_norm(model)
    assert type(model[1]) is nn.SyncBatchNorm
    assert model[1].process_group == "mine"

    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm):
        split = swap.split_batch_norm(network())
        before = copy.deepcopy(split)
        with pytest.raises(TypeError, match="would lose the split: convert the model first"):
            convert(split)
        assert str(split) == str(before)
        x = torch.rand(4, 3, 8, 8)
        torch.testing.assert_close(split(x), before(x), rtol=0, atol=0)
        with pytest.raises(TypeError, match="would lose the split"):
            convert(swap.split_batch_norm(convert(network())))


def test_frozen_and_other_norms_are_left_alone() -> None:
    frozen = torchvision.ops.FrozenBatchNorm2d(3)
    model = nn.Sequential(frozen, nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.BatchNorm2d(3))
    kinds = list(map(type, model))
    swap.split_batch_norm(model)
    assert list(map(type, model)) == [*kinds[:3], SplitBatchNorm2d]
    assert model[0] is frozen


class Custom(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("build", [lambda: Custom(3), nn.LazyBatchNorm2d, lambda: timm.layers.SplitBatchNorm2d(3)])
def test_unknown_classes_are_an_error_and_nothing_is_changed(build: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), build())
    kinds = list(map(type, model.modules()))
    with pytest.raises(
        ValueError,
        match=r"model\.1.*: expected (a batch norm of torch's or timm's own .*filter_fn can leave|a norm that is not sp"
        "|a module that knows its sizes)",
    ):
        swap.split_batch_norm(model)
    assert list(map(type, model.modules())) == kinds
    swap.split_batch_norm(model, filter_fn=lambda module, name: name == "0")
    assert type(model[0]) is SplitBatchNorm2d
    assert list(map(type, model[1].modules())) == kinds[2:]


def test_forward_set_on_the_object_is_an_error() -> None:
    model = network()
    model[1].forward = lambda x: x
    with pytest.raises(ValueError, match=r"model\.1: expected the forward of its class"):
        swap.split_batch_norm(model)


def test_shared_modules_and_tied_parameters() -> None:
    norm, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    other.weight = norm.weight
    model = nn.Sequential(norm, nn.ReLU(), norm, other)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    swap.split_batch_norm(model)
    assert model[0] is model[2] is norm
    assert model[3].weight is model[0].weight
    assert {id(p) for p in optimizer.param_groups[0]["params"]} < {id(p) for p in model.parameters()}
    model(torch.randn(4, 3, 2, 2))
    assert norm.num_batches_tracked == norm.aux_bn[0].num_batches_tracked == 2


@pytest.mark.parametrize("fused", [False, True])
def test_copies(fused: bool) -> None:
    model = swap.split_batch_norm(nn.Sequential(act_norm(3) if fused else nn.BatchNorm2d(3)), 3).eval()
    for norm in model[0].split_norms:
        trained(norm)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = torch.randn(4, 3, 2, 2)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        with use_split(model, 2), use_split(twin, 2):
            assert torch.equal(twin(x), model(x))
        assert type(swap.plain_batch_norm(twin)[0]) is (BatchNormAct2d if fused else nn.BatchNorm2d)


def test_compile() -> None:
    model = swap.split_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), act_norm(4)))
    model[1].drop.p = 0.0
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), twin(x))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"expected at least one batch norm to swap, got none in Linear"):
        swap.split_batch_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"that filter_fn accepts \(1 without it\)"):
        swap.split_batch_norm(network(), filter_fn=lambda module, name: False)
    with pytest.raises(TypeError, match="model: expected a Module, got str"):
        swap.split_batch_norm("resnet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_splits: expected at least 2, got 1"):
        swap.split_batch_norm(network(), 1)
    with pytest.raises(ValueError, match="split_sizes: expected num_splits=3"):
        swap.split_batch_norm(network(), 3, split_sizes=(4, 4))
    with pytest.raises(ValueError, match="expected at least one split batch norm to swap, got none in Linear"):
        swap.plain_batch_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"split: expected at most 1, the last of model\.1, got 2"):
        swap.plain_batch_norm(swap.split_batch_norm(network()), 2)
    with pytest.raises(ValueError, match="split: expected at least 0, got -1"):
        swap.plain_batch_norm(network(), -1)

    class Ours(SplitBatchNorm2d):
        pass

    with pytest.raises(ValueError, match="expected a split norm of this package's classes, got Ours"):
        swap.plain_batch_norm(nn.Sequential(Ours(3)))
