"""Layers inside our modules that are more than plain layers: each must be called as the formula calls it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.modules import module as every
from torch.nn.utils import parametrizations, parametrize, prune

from paper_layers import (
    big_bigan,
    deep_gcn,
    point_rend,
)
from paper_layers._core.fusing import readable
from paper_layers.adv_prop._auxiliary import AuxiliaryNorm
from tests._core.public_modules import MODULES, layers, made
from tests.ops.test_neighbor_reduce import features

WITHOUT_LAYERS = {"DilatedKNN", "ImplicitPointHead", "SpectralLinear"}


def test_every_public_module_is_here() -> None:
    public = {name for package in (big_bigan, deep_gcn, point_rend) for name in package.__all__}
    modules = {
        name for name in public if any(_is_module(getattr(p, name, None)) for p in (big_bigan, deep_gcn, point_rend))
    }
    assert modules <= {name.split()[0] for name in MODULES} | WITHOUT_LAYERS


def _is_module(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def forward_hook(model: nn.Module, name: str) -> Any:
    model.get_submodule(name).register_forward_hook(lambda module, inputs, output: 2 * output)


def pre_hook(model: nn.Module, name: str) -> Any:
    model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def pre_hook_with_kwargs(model: nn.Module, name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, kwargs: Any) -> Any:
        return (2 * inputs[0],), kwargs

    model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)


def backward_hook(model: nn.Module, name: str) -> Any:
    model.get_submodule(name).register_full_backward_hook(lambda module, inputs, outputs: called.append(name))


def backward_pre_hook(model: nn.Module, name: str) -> Any:
    model.get_submodule(name).register_full_backward_pre_hook(lambda module, outputs: called.append(name))


def global_hook(model: nn.Module, name: str) -> Any:
    layer = model.get_submodule(name)
    return every.register_module_forward_hook(lambda module, inputs, output: 2 * output if module is layer else None)


def subclass(model: nn.Module, name: str) -> Any:
    layer = model.get_submodule(name)
    kind = type(layer)
    layer.__class__ = type("Double", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})


def patched_forward(model: nn.Module, name: str) -> Any:
    layer = model.get_submodule(name)
    layer.forward = functools.partial(lambda old, x: 2 * old(x), layer.forward)


class PatchedClass:
    """Another forward on the layer's class, for as long as it is not removed."""

    def __init__(self, model: nn.Module, name: str):
        layer = model.get_submodule(name)
        self.patch = pytest.MonkeyPatch()
        old = type(layer).forward
        self.patch.setattr(type(layer), "forward", lambda m, x: 2 * old(m, x) if m is layer else old(m, x))

    def remove(self) -> None:
        self.patch.undo()


class Adapted(nn.Module):
    """A layer and what is trained beside it, with the attributes of the layer."""

    def __init__(self, base: Any):
        super().__init__()
        self.base, self.low = base, copy.deepcopy(base)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.low(x)


def wrapper(model: nn.Module, name: str) -> Any:
    model.set_submodule(name, Adapted(model.get_submodule(name)))


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def parametrised(model: nn.Module, name: str) -> Any:
    parametrize.register_parametrization(model.get_submodule(name), "weight", Double())


def weight_norm(model: nn.Module, name: str) -> Any:
    parametrizations.weight_norm(model.get_submodule(name))


def pruned(model: nn.Module, name: str) -> Any:
    prune.identity(model.get_submodule(name), "weight")
    model.get_submodule(name).weight_mask.fill_(2)


def offloaded(model: nn.Module, name: str) -> Any:
    """As accelerate does it with a hook: the weight is there only during the call."""
    layer = model.get_submodule(name)
    weight, away = layer.weight, nn.Parameter(layer.weight.detach().to("meta"))
    layer.weight = away
    layer.register_forward_pre_hook(lambda *_: setattr(layer, "weight", weight))
    layer.register_forward_hook(lambda *_: setattr(layer, "weight", away))
    called.extend([weight])


def sharded(model: nn.Module, name: str) -> Any:
    fully_shard(model.get_submodule(name), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


CHANGES: dict[Callable[[nn.Module, str], Any], tuple[int, int]] = {
    forward_hook: (2, 2),
    pre_hook: (2, 1),
    pre_hook_with_kwargs: (2, 1),
    backward_hook: (1, 1),
    backward_pre_hook: (1, 1),
    global_hook: (2, 2),
    subclass: (2, 2),
    patched_forward: (2, 2),
    PatchedClass: (2, 2),
    wrapper: (2, 2),
    parametrised: (2, 1),
    weight_norm: (1, 1),
    pruned: (2, 1),
    offloaded: (1, 1),
    sharded: (1, 1),
}
ON_NORMS = (
    forward_hook,
    backward_hook,
    global_hook,
    subclass,
    patched_forward,
    PatchedClass,
    parametrised,
    pruned,
    offloaded,
    sharded,
    wrapper,
)
called: list[Any] = []


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder: Path = tmp_path_factory.mktemp("gloo")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", MODULES)
def test_layers_are_called(name: str, change: Callable[[nn.Module, str], Any]) -> None:
    """A layer whose output or input is doubled does what one with doubled parameters does."""
    _, shape, run = MODULES[name]
    for layer_name, layer in layers(made(name)).items():
        if not isinstance(layer, nn.Linear | nn.Conv2d) and change not in ON_NORMS:
            continue
        if isinstance(layer, AuxiliaryNorm) and change is wrapper:
            continue  # It is refused: see test_norm.
        expected, model = made(name), made(name)
        with torch.no_grad():
            twin = layers(expected)[layer_name]
            twin.weight *= CHANGES[change][0]
            if twin.bias is not None:
                twin.bias *= CHANGES[change][1]
        called.clear()
        handle = change(model, layer_name)
        results = []
        for one in (expected, model):
            x = features(*shape).double().requires_grad_()
            output = run(one, x)
            (grad,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
            output.square().sum().backward()
            results.append((output, grad))
        if handle is not None:
            handle.remove()
        torch.testing.assert_close(*results, msg=lambda text, n=layer_name: f"{n}: {text}")
        missing = [n for n, p in model.named_parameters() if p.grad is None and not p.is_meta]
        without = [n for n, p in expected.named_parameters() if p.grad is None]
        assert len(missing) == len(without), f"{layer_name}: no gradient for {missing}"
        if change in (backward_hook, backward_pre_hook):
            assert called, layer_name
        if change is offloaded:
            assert called[0].grad is not None, layer_name


@pytest.mark.parametrize("name", MODULES)
def test_quantised_layers_are_called(name: str) -> None:
    _, shape, run = MODULES[name]
    model = made(name).float().eval()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    watched = copy.deepcopy(quantised)
    kind = torch.ao.nn.quantized.dynamic.Linear
    linear = [n for n, m in watched.named_modules() if isinstance(m, kind)]
    for layer in linear:
        watched.get_submodule(layer).register_forward_hook(lambda m, inputs, output, n=layer: called.append(n))
    called.clear()
    with torch.no_grad():
        x = features(*shape)
        torch.testing.assert_close(run(quantised, x), run(watched, x))
    assert {*called} == {*linear}
    assert not layers(quantised).keys() & {n for n, m in layers(model).items() if type(m) is nn.Linear}


def test_methods_beside_forward_gather_shards() -> None:
    """FSDP2 gathers parameters around `forward`; hosts call other methods too."""
    maps, coarse, points = features(1, 4, 15, 20), features(1, 3, 10, 10), torch.rand(1, 6, 2)
    refine = point_rend.PointRendSemantic(4, 3, hidden_features=5)
    expected = refine.predict(maps, coarse, points)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(refine, mesh=mesh)
    torch.testing.assert_close(refine.predict(maps, coarse, points), expected)
    refine.point_loss(maps, coarse, torch.ones(1, 40, 40, dtype=torch.int64)).backward()
    assert all(p.grad is not None for p in refine.parameters())
    boxes, labels = [torch.tensor([[4.0, 4, 40, 40]])], [torch.tensor([1])]
    head = point_rend.PointRendMask(4, 2, hidden_features=5, coarse_hidden_channels=3, coarse_hidden_features=5)
    expected = head(maps, boxes, labels, size=28)
    fully_shard(head, mesh=mesh)
    torch.testing.assert_close(head.refine(maps, head.coarse(maps, boxes), boxes, labels, size=28), expected)
    trunk = Trunk(3, 3)
    discriminator = big_bigan.BigBiGANDiscriminator(trunk, 3, 4, hidden_features=6, depth=2)
    fully_shard(trunk, mesh=mesh)
    fully_shard(discriminator, mesh=mesh)
    discriminator(features(5, 3), features(5, 4)).x.sum().backward()
    assert trunk.weight.grad is not None


def test_forward_keeps_its_parameters_until_its_end() -> None:
    """A module that is no root of FSDP2 gives up its parameters after each method that gathers them."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    discriminator = big_bigan.BigBiGANDiscriminator(Trunk(3, 3), 3, 4, hidden_features=6, depth=2).eval()
    images, latents = features(5, 3), features(5, 4)
    expected = discriminator(images, latents).xz
    fully_shard(discriminator, mesh=mesh, reshard_after_forward=True)
    torch.testing.assert_close(discriminator(images, latents).xz, expected)
    head = point_rend.PointRendMask(
        4, 2, hidden_features=5, coarse_hidden_channels=3, coarse_hidden_features=5, num_points=9
    )
    fully_shard(head, mesh=mesh, reshard_after_forward=True)
    boxes, labels, masks = [torch.tensor([[4.0, 4, 40, 40]])], [torch.tensor([1])], [torch.ones(1, 60, 80)]
    sum(head(features(1, 4, 15, 20), boxes, labels, masks).values()).backward()
    assert all(p.grad is not None for p in head.parameters())


class Trunk(nn.Linear):
    """An image network in timm's manner."""

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward(x)


def test_parts_of_the_point_head_refuse_layers_that_must_be_called() -> None:
    head = point_rend.PointRendHead(4, 3, hidden_features=5)
    head.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="layers: expected plain"):
        head.fine_shares([features(2, 4, 6)])


@pytest.mark.parametrize("activation", ["pre", "post"])
def test_hooks_keep_what_they_saw(activation: str) -> None:
    mlp = big_bigan.ResidualMLP(4, hidden_features=6, depth=2, activation=activation)
    seen = []
    for name in ("fc1", "fc2", "skip"):
        mlp.blocks[0].get_submodule(name).register_forward_hook(lambda *a: seen.append((a[2], a[2].clone())))
    mlp(features(8, 4))
    assert all(torch.equal(kept, copied) for kept, copied in seen)


def test_spectral_norm_beside_other_parametrisations() -> None:
    layer = big_bigan.ResidualMLP(4, hidden_features=6, depth=2).blocks[0].fc1
    host = nn.Linear(4, 6)
    host.load_state_dict({"weight": layer.parametrizations.weight.original, "bias": layer.bias})
    parametrizations.spectral_norm(host)
    host.load_state_dict(layer.state_dict())
    x = features(8, 4)
    with parametrize.cached():
        torch.testing.assert_close(layer(x) + layer(x), host(x) + host(x))
    torch.testing.assert_close(layer.state_dict(), host.state_dict())
    for one in (layer, host):
        parametrize.register_parametrization(one, "weight", Double())
    torch.testing.assert_close(layer(x), host(x))
    several = big_bigan.ResidualMLP(4, hidden_features=6, depth=2, spectral_norm=False).blocks[0].fc1
    host = nn.Linear(4, 6)
    host.load_state_dict(several.state_dict())
    for one in (several, host):
        torch.manual_seed(0)
        parametrizations.spectral_norm(one, n_power_iterations=3)
    torch.testing.assert_close(several(x), host(x))


@pytest.mark.parametrize(
    "name", ["Perceptron", "EdgeConv", "EdgeConv on edges", "MRConv", "SAGEConv on edges", "DeepGCN"]
)
def test_perceptrons_of_a_changed_class_are_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, old = made(name), deep_gcn.Perceptron.forward
    monkeypatch.setattr(deep_gcn.Perceptron, "forward", lambda *a, **k: called.append(a[0]) or old(*a, **k))
    called.clear()
    MODULES[name][2](model, features(*MODULES[name][1]).double())
    assert {*called} == {m for m in model.modules() if isinstance(m, deep_gcn.Perceptron)}


def test_traces_as_one_graph() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: Tensor) -> tuple[Tensor, bool]:
        return layer(x), readable(layer, nn.Linear)

    layer = nn.Linear(4, 4)
    assert run(torch.ones(1, 4))[1]


def fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODULES[name][0]()
    if isinstance(model, big_bigan.BigBiGANDiscriminator):
        model.trunk = nn.Flatten()
    return model


@pytest.mark.parametrize("name", MODULES)
def test_reset_parameters_resets_everything(name: str) -> None:
    model, garbage = fresh(name), fresh(name)
    for tensor in (*garbage.parameters(), *garbage.buffers()):
        nn.init.constant_(tensor.detach(), 7)
    for one in (model, garbage):
        torch.manual_seed(1)
        one.reset_parameters()
    torch.testing.assert_close(garbage.state_dict(), model.state_dict())
