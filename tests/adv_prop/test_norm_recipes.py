"""Split norms under loops over modules, averaging of weights, pruning and checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules, fuse_modules_qat
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
import timm
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
# isort: on

from paper_layers import SplitBatchNorm1d, SplitBatchNorm2d, SplitBatchNorm3d, swap
from paper_layers.adv_prop import use_split
from tests.adv_prop.test_norm import by_hand, state, trained


def network() -> nn.Sequential:
    return swap.split_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))


KINDS = [(SplitBatchNorm1d, nn.BatchNorm1d), (SplitBatchNorm2d, nn.BatchNorm2d), (SplitBatchNorm3d, nn.BatchNorm3d)]


@pytest.mark.parametrize(("split", "plain"), KINDS)
def test_all_splits_are_norms_of_torchs_class(split: Any, plain: Any) -> None:
    """A rule by class finds the parameters of every split."""
    assert all(isinstance(norm, plain) for norm in split(3, num_splits=3).split_norms)
    swapped = swap.split_batch_norm(plain(3), 3)
    assert all(isinstance(norm, plain) for norm in swapped.split_norms)
    ruled = [p for m in swapped.modules() if isinstance(m, plain) for p in m.parameters(recurse=False)]
    assert len(ruled) == len(list(swapped.parameters())) == 6


def test_frozen_by_a_loop() -> None:
    model = network().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    before, x = state(model), torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model[1](model[0](x)), by_hand(model[0](x), model[1], torch.zeros(4), torch.ones(4)))
    model(x).sum().backward()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model[1].parameters())


@pytest.mark.parametrize("synchronized", [False, True])
def test_timm_freezes_the_main_norm(synchronized: bool) -> None:
    model, x = timm.create_model("test_efficientnet").train(), torch.randn(2, 3, 32, 32)
    model(torch.randn(4, 3, 32, 32))
    if synchronized:
        model = timm.layers.convert_sync_batchnorm(model)
    expected = timm.layers.freeze_batch_norm_2d(copy.deepcopy(model)).eval()
    split = swap.split_batch_norm(model)
    assert all(isinstance(m, BatchNormAct2d) for m in split.modules() if hasattr(m, "num_splits"))
    frozen = timm.layers.freeze_batch_norm_2d(split)
    kinds = {type(m) for m in frozen.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNormAct2d)}
    assert kinds == {FrozenBatchNormAct2d}
    torch.testing.assert_close(frozen.eval()(x), expected(x))
    thawed = timm.layers.unfreeze_batch_norm_2d(frozen).eval()
    torch.testing.assert_close(thawed(x), expected(x))


def test_folding_is_of_the_evaluated_norm() -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    trained(model[1])
    trained(model[1].aux_bn[0])
    for fuse in (lambda m: fuse_conv_bn_eval(m[0], m[1]), lambda m: fuse_modules_qat(m, ["0", "1"])):
        with pytest.raises((AssertionError, NotImplementedError), match=r"only for eval|Cannot fuse|find fuser"):
            fuse(model.train())
    model.eval()
    with pytest.raises(AssertionError, match="did not find fuser method"):
        fuse_modules(model, ["0", "1"])
    for split in (0, 1):
        with use_split(model, split):
            fused = fuse_conv_bn_eval(model[0], model[1])
            torch.testing.assert_close(fused(x), model[1](model[0](x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("split", [None, 0, 1])
@pytest.mark.parametrize("averaged", [False, True])
def test_update_bn(momentum: float | None, split: int | None, averaged: bool) -> None:
    """One split gets the statistics of all images, also of an odd last batch; the others don't change."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum)).double()
    model = swap.split_batch_norm(copy.deepcopy(plain))
    trained(model[1])
    before = state(model)
    batches = [torch.randn(n, 3, 6, 6).double() for n in (4, 4, 3)]
    update_bn(batches, plain)
    net: nn.Module = AveragedModel(model) if averaged else model
    if split is None:
        update_bn(batches, net)
    else:
        with use_split(net, split):
            update_bn(batches, net)
    after = (net.module if isinstance(net, AveragedModel) else net).state_dict()
    prefix = "1.aux_bn.0." if split == 1 else "1."
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(after[prefix + name], plain.state_dict()[f"1.{name}"])
        del after[prefix + name], before[prefix + name]
    torch.testing.assert_close(dict(after), dict(before), rtol=0, atol=0)
    model.train()(batches[0])  # Split by split again.
    assert model[1].aux_bn[0].num_batches_tracked == before["1.aux_bn.0.num_batches_tracked"] + 1 if split != 1 else 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_batches_count_once(reentrant: bool) -> None:
    model = network().double()
    twin, x = copy.deepcopy(model), torch.randn(4, 3, 8, 8).double().requires_grad_()
    (grad,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)
    if reentrant:
        model = copy.deepcopy(twin)
        checkpoint(model, x, use_reentrant=True).square().sum().backward()
        grad = x.grad
    torch.testing.assert_close(grad, torch.autograd.grad(twin(x).square().sum(), x)[0])
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


class Checkpointed(nn.Sequential):
    """Layers that the backward recomputes, nested layers twice."""

    reentrant: bool | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.reentrant is None:
            return super().forward(input)
        return checkpoint(super().forward, input, use_reentrant=self.reentrant)


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_runs_the_split_of_its_forward(reentrant: bool, update: bool) -> None:
    inner = Checkpointed(*network())
    model = Checkpointed(inner, nn.Conv2d(4, 5, 3), swap.split_batch_norm(nn.BatchNorm2d(5)), nn.Tanh()).double()
    for p in model.parameters():
        nn.init.normal_(p)  # Splits differ.
    twin, x = copy.deepcopy(model), torch.randn(4, 3, 8, 8).double().requires_grad_()
    model.reentrant = inner.reentrant = reentrant
    for one in (model, twin):
        x.grad = None
        with use_split(one, 1, update_statistics=update):
            first = one(x)
        second = one(x)
        with use_split(one, 0):  # The innermost context wins, also in a backward inside another one.
            with use_split(one, 1):
                third = one(x)
            fourth = one(x)
            (first.square().sum() + third.exp().sum() + fourth.sin().sum()).backward()
        second.cos().sum().backward()
        assert not any(module._split for module in one.modules() if isinstance(module, SplitBatchNorm2d))
        if one is model:
            grad = x.grad
    torch.testing.assert_close(grad, x.grad)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_checkpointed_timm_network_in_a_split() -> None:
    model = swap.split_batch_norm(timm.create_model("resnet18", num_classes=10, zero_init_last=False)).train()
    twin, x, y = copy.deepcopy(model), torch.rand(4, 3, 32, 32), torch.randint(10, (4,))
    model.set_grad_checkpointing(True)
    for one in (model, twin):
        with use_split(one, 1):
            loss = F.cross_entropy(one(x), y)
        loss.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4, 3, 0, 4)])
def test_batches_without_values(shape: tuple[int, ...]) -> None:
    """They pass and have gradients of zero, as with torch's norms."""
    norm, plain, x = trained(SplitBatchNorm2d(3)), nn.BatchNorm2d(3), torch.zeros(shape)
    before = state(norm)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for one, leaf in zip((norm, plain), leaves, strict=True):
        output = one(leaf)
        assert output.shape == shape
        output.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == shape
        assert all(p.grad is not None and (p.grad == 0).all() for p in one.parameters())
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    assert norm.eval()(x).shape == shape


def test_split_without_images() -> None:
    """The other splits are normalized as usual; the empty one keeps its statistics."""
    norm = trained(SplitBatchNorm2d(3, num_splits=3, split_sizes=(0.5, 0.1, 0.4), dtype=torch.float64))
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    before, sizes = state(norm), norm.sizes(4)
    assert sizes == [2, 0, 2]
    output = norm(x)
    parts = [
        F.batch_norm(part, None, None, one.weight, one.bias, training=True)
        for part, one in zip(x.split(sizes), norm.split_norms, strict=True)
        if len(part)
    ]
    torch.testing.assert_close(output, torch.cat(parts))
    (grad,) = torch.autograd.grad(torch.cat(parts).cos().sum(), x)
    output.cos().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad)
    assert all((p.grad == 0).all() for p in norm.aux_bn[0].parameters())
    moved = {name for name, value in norm.state_dict().items() if not torch.equal(value, before[name])}
    names = ("running_mean", "running_var", "num_batches_tracked")
    assert moved == {prefix + name for prefix in ("", "aux_bn.1.") for name in names}


@pytest.mark.parametrize(
    ("kind", "x"),
    [(SplitBatchNorm1d, torch.ones(2, 3)), (SplitBatchNorm2d, torch.ones(2, 3, 1, 1))],
)
def test_one_value_is_refused_as_torch_does(kind: Any, x: Tensor) -> None:
    norm = kind(3)
    before = state(norm)
    with pytest.raises(ValueError, match="at least 2 values per channel"):
        norm(x)
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)


def test_error_names_the_norm() -> None:
    with pytest.raises(ValueError, match=r"num_splits=2 divides, got 3 in model\.1; set split_sizes"):
        network()(torch.ones(3, 3, 4, 4))


@pytest.mark.parametrize("place", [0, 1])
def test_pruned_norms(place: int) -> None:
    """A split works with a weight that pruning computes before each forward, but surgery can't copy the weight."""
    model = nn.Sequential(nn.BatchNorm2d(4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"model\.0: expected weight to be a parameter .*prune\.remove"):
        swap.split_batch_norm(model)
    assert type(model[0]) is nn.BatchNorm2d
    prune.remove(model[0], "weight")
    split, x = swap.split_batch_norm(model), torch.randn(4, 4, 9, 9)
    assert torch.equal(split[0].aux_bn[0].weight, split[0].weight)
    prune.l1_unstructured(split[0].split_norms[place], "weight", 0.75)
    split(x).sum().backward()
    with pytest.raises(ValueError, match=r"model\.0: expected weight to be a parameter"):
        swap.plain_batch_norm(split, 1)
    split(x)
    prune.remove(split[0].split_norms[place], "weight")
    assert (swap.plain_batch_norm(split, place)[0].weight == 0).sum() == 3
    split(x)


def test_pruned_main_norm_becomes_plain() -> None:
    split, x = network().eval(), torch.randn(4, 3, 8, 8)
    prune.l1_unstructured(split[1], "weight", 0.5)
    expected = split(x)
    torch.testing.assert_close(swap.plain_batch_norm(split)(x), expected)
    assert "weight_orig" in split[1].state_dict()


def test_tensors_that_a_user_added_are_not_copied() -> None:
    norm = nn.BatchNorm2d(4)
    norm.scale = nn.Parameter(torch.ones(4))
    norm.register_buffer("mask", torch.ones(4))
    split = swap.split_batch_norm(nn.Sequential(norm))
    assert list(split[0].aux_bn[0].state_dict()) == list(nn.BatchNorm2d(4).state_dict())
    assert swap.plain_batch_norm(split, 1)[0].scale is norm.scale
