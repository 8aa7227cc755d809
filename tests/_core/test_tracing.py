"""torch.fx, torchvision's and timm's feature extractors go around our layers as around torch's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
import timm
import torchvision
from timm.models._features_fx import GraphExtractNet
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
# isort: on

import paper_layers
from paper_layers import (
    LazyLIPPool2d,
    LIPPool2d,
    SplitBatchNorm1d,
    SplitBatchNorm2d,
    SplitBatchNorm3d,
    big_bigan,
    deep_gcn,
    lip,
    point_rend,
    swap,
)
from paper_layers.adv_prop import SplitSyncBatchNorm


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def in_use(pool: LazyLIPPool2d) -> LazyLIPPool2d:
    pool(torch.randn(1, 4, 8, 8))
    return pool


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pool": (lambda: LIPPool2d(4), (4, 4, 8, 8)),
    "pool of a function": (lambda: LIPPool2d(4, logit=torch.zeros_like), (4, 4, 8, 8)),
    "lazy pool": (lambda: in_use(LazyLIPPool2d()), (4, 4, 8, 8)),
    "convolution": (lambda: swap.LIPConv2d(4, 6, 3, 2, 1), (4, 4, 8, 8)),
    "1d": (lambda: SplitBatchNorm1d(4), (4, 4)),
    "2d": (lambda: SplitBatchNorm2d(4), (4, 4, 8, 8)),
    "3d": (lambda: SplitBatchNorm3d(4), (4, 4, 2, 8, 8)),
    "sync": (lambda: SplitSyncBatchNorm(4), (4, 4, 8, 8)),
    "timm": (lambda: swap.split_batch_norm(timm.layers.BatchNormAct2d(4)), (4, 4, 8, 8)),
    "bottleneck logit": (lambda: lip.BottleneckLogit(4, 8), (4, 4, 8, 8)),
    "bottleneck stem": (lambda: lip.BottleneckStem(4, 8), (4, 4, 8, 8)),
    "logit head": (lambda: lip.LogitHead(4, 8), (4, 4, 8, 8)),
    "transition": (lambda: lip.LIPTransition(4, 4), (4, 4, 8, 8)),
    "bottleneck": (lambda: lip.LIPBottleneck(4, 2, 2), (4, 4, 8, 8)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer: str) -> None:
    """The traced model has the same modules, computes the same, trains, and moves statistics."""
    build, shape = LAYERS[layer]
    model = nn.Sequential(build(), nn.Identity())
    twin, x = copy.deepcopy(model), torch.randn(shape, requires_grad=True)
    traced = fx.symbolic_trace(model)
    before = copy.deepcopy(traced.state_dict())
    assert list(before) == list(twin.state_dict())
    for _ in range(2):
        outputs = traced(x), twin(x)
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.cos().sum().backward()
    grads = [{name: p.grad for name, p in one.named_parameters()} for one in (traced, twin)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(dict(traced.state_dict()), dict(twin.state_dict()))
    torch.testing.assert_close(traced.eval()(x), twin.eval()(x))


def test_hooks_run_once() -> None:
    model = nn.Sequential(LIPPool2d(4, logit="projection"))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    x, seen = torch.randn(2, 4, 8, 8), []
    traced = fx.symbolic_trace(model)
    model[0].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(traced(x), model(x))
    assert len(seen) == 2


class Doubled(LIPPool2d):
    def forward(self, input: Tensor, logit_input: Tensor | None = None) -> Tensor:
        return 2 * super().forward(input, logit_input)


def test_subclass_and_root() -> None:
    x, images = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 64, 64)
    doubled, pool, net = nn.Sequential(Doubled(4)), LIPPool2d(4), lip.lip_resnet50(num_classes=3).eval()
    torch.testing.assert_close(fx.symbolic_trace(doubled)(x), doubled(x))
    torch.testing.assert_close(fx.symbolic_trace(pool, {"logit_input": None})(x), pool(x))
    torch.testing.assert_close(fx.symbolic_trace(net)(images), net(images))


INDEX = torch.tensor([[1, 2], [0, 2], [0, 1]])
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "lip_pool2d": (lambda x: paper_layers.lip_pool2d(x, logit=x, kernel_size=2), (2, 3, 4, 4)),
    "split_batch_norm": (lambda x: paper_layers.split_batch_norm(x, [1, 1]), (2, 3, 4, 4)),
    "knn": (lambda x: paper_layers.knn(x, k=2)[0], (6, 3)),
    "edge_conv": (lambda x: paper_layers.edge_conv(x, x, INDEX)[0], (3, 4)),
    "neighbor_reduce": (lambda x: paper_layers.neighbor_reduce(x, INDEX), (3, 4)),
    "point_sample": (lambda x: paper_layers.point_sample(x, x[:, 0, :, :2].sigmoid()), (2, 3, 4, 4)),
    "uncertain_points": (lambda x: paper_layers.uncertain_points(x, 3)[0], (2, 3, 4, 4)),
    "soft_triple_loss": (
        lambda x: paper_layers.soft_triple_loss(x, torch.eye(4).view(2, 2, 4), INDEX[0, :1] - 1),
        (1, 4),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    """One node each, wherever they are called from."""
    function, shape = FUNCTIONS[name]
    traced, x = fx.symbolic_trace(function), torch.randn(shape)
    assert any(node.target is getattr(paper_layers, name) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x), function(x))


def test_sample_uncertain_points() -> None:
    traced = fx.symbolic_trace(lambda x: paper_layers.sample_uncertain_points(x, 5))
    assert traced(torch.randn(2, 3, 8, 8)).shape == (2, 5, 2)


SWAPS = {
    "pooling": lambda model: swap.pooling(model, "projection"),
    "strided_conv": lambda model: swap.strided_conv(model, "projection"),
    "split_batch_norm": swap.split_batch_norm,
}


@pytest.mark.parametrize("name", SWAPS)
def test_feature_extractors(name: str) -> None:
    """The nodes have the names that they had before the swap."""
    host = torchvision.models.resnet18(num_classes=3)
    names = get_graph_node_names(host)
    model, x = SWAPS[name](copy.deepcopy(host)), torch.randn(4, 3, 32, 32)
    assert get_graph_node_names(model) == names
    twin = copy.deepcopy(model)
    features = create_feature_extractor(model, ["layer2", "fc"])(x)
    torch.testing.assert_close(features["fc"], twin(x))
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))
    extractor = GraphExtractNet(SWAPS[name](timm.create_model("resnet18")), {"layer2": "layer2"})
    assert extractor(x).shape == (4, 128, 4, 4)


class Scaled(nn.Module):
    """A host with an option, whose output may be in a dictionary."""

    def __init__(self, named: bool):
        super().__init__()
        self.body, self.head, self.named = nn.Conv2d(3, 6, 3, 4, 1), nn.Conv2d(6, 4, 3, 2, 1), named

    def forward(self, images: Tensor, scale: float = 8.0) -> Any:
        logits = nn.functional.interpolate(self.head(self.body(images)), scale_factor=scale)
        return {"out": logits} if self.named else logits


@pytest.mark.parametrize("named", [False, True])
def test_point_rend(named: bool) -> None:
    """The graph has all arguments, and follows the mode."""
    model = swap.point_rend(Scaled(named), fine="body", coarse="head", num_points=20, subdivision_num_points=20)
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(4, (2, 32, 32))
    for whole in (model, nn.Sequential(model)):
        traced = fx.symbolic_trace(whole)
        arguments: list[dict[str, Any]] = [{}, {"target": labels}] if whole is model else [{}]
        for module in (traced.eval(), traced.train()):
            for more in arguments:
                torch.manual_seed(0)
                expected = whole.train(module.training)(images, **more)
                torch.manual_seed(0)
                torch.testing.assert_close(module(images, **more), expected)
                torch.manual_seed(0)
                values = (images, 8.0, *more.values()) if whole is model else (images,)
                torch.testing.assert_close(fx.Interpreter(module).run(*values), expected)


def test_big_bigan() -> None:
    layers = nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(inplace=True), nn.Conv2d(4, 1, 4), nn.ReLU(inplace=True)
    model = swap.big_bigan(nn.Sequential(*layers), 5, hidden_features=4, depth=2).eval()
    images, latents = torch.randn(4, 3, 8, 8), torch.randn(4, 5)
    traced = fx.symbolic_trace(model)
    torch.testing.assert_close(traced(images, latents), model(images, latents))
    extractor = create_feature_extractor(model, ["1", "score"])(images, latents)
    torch.testing.assert_close(extractor["score"], model(images, latents))


class Holder(nn.Module):
    def __init__(self, layer: nn.Module, count: int):
        super().__init__()
        self.layer, self.count = layer, count

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.layer(a, b) if self.count == 2 else self.layer(a)


X, TABLE = torch.linspace(-1, 1, 30).reshape(10, 3), torch.arange(20).reshape(10, 2) % 10
MAPS = torch.linspace(0, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
HEADS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    **{
        kind.__name__: (functools.partial(kind, 3, 4), (X, TABLE))
        for kind in (deep_gcn.EdgeConv, deep_gcn.MRConv, deep_gcn.GINConv, deep_gcn.SAGEConv)
    },
    "neighbors": (lambda: deep_gcn.DilatedKNN(2), (X,)),
    "block": (lambda: deep_gcn.ResGCNBlock(3, k=2), (X,)),
    "network": (lambda: deep_gcn.DeepGCN(3, 2, channels=4, blocks=2, k=2), (X,)),
    "point head": (
        lambda: point_rend.PointRendHead(4, 3, hidden_features=5),
        (MAPS.flatten(2), MAPS[:, :3].flatten(2)),
    ),
    "latent": (lambda: big_bigan.LatentHead(3, 2, hidden_features=4), (X,)),
    "pairs": (lambda: big_bigan.JointHead(3, 3, hidden_features=4, depth=2), (X, X)),
    "perceptron": (lambda: big_bigan.ResidualMLP(3, hidden_features=4, depth=2), (X,)),
    "loss": (lambda: paper_layers.SoftTripleLoss(5, 3, 2), (X, TABLE[:, 0] % 5)),
}


@pytest.mark.parametrize("name", HEADS)
def test_layers_of_the_other_papers(name: str) -> None:
    build, arguments = HEADS[name]
    model = Holder(build().eval(), len(arguments)).eval()
    pair = (*arguments, arguments[0])[:2]
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer"]
    torch.manual_seed(0)
    expected = model(*pair)
    torch.manual_seed(0)
    torch.testing.assert_close(traced(*pair), expected)


def test_graph_functions() -> None:
    def edges(x: Tensor, table: Tensor) -> Tensor:
        listed = deep_gcn.to_edge_index(table)
        return torch.cat([deep_gcn.knn_graph(x, 2), deep_gcn.to_edge_index(deep_gcn.from_edge_index(listed, 10))], 1)

    assert torch.equal(fx.symbolic_trace(edges)(X, TABLE), edges(X, TABLE))


def test_compiled_one_by_one() -> None:
    """Each class has graphs of its own: torch.compile keeps eight of a code object, and then no more."""
    torch._dynamo.reset()
    for build, arguments in HEADS.values():
        torch.compile(build().eval(), backend="eager", fullgraph=True)(*arguments)


def larger(tensor: Tensor) -> Tensor:
    """Twice as many rows or images, the images larger as well."""
    images = torch.nn.functional.pad(tensor, (0, 2) * (tensor.dim() - 2), value=0.5) if tensor.dim() > 3 else tensor
    return torch.cat([images, images])


SYMBOLIC = (
    "pool",
    "2d",
    "logit head",
    "EdgeConv",
    "MRConv",
    "SAGEConv",
    "block",
    "point head",
    "pairs",
    "loss",
)


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes(name: str) -> None:
    """Under them torch takes decompositions for the fakes of ops, whose memory must be laid out alike."""
    if name in LAYERS:
        build, shape = LAYERS[name]
        inputs: tuple[Tensor, ...] = (torch.randn(shape),)
    else:
        build, inputs = HEADS[name]
    layer = build()
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tensors in (inputs, tuple(map(larger, inputs))):
        results = []
        for run in (compiled, twin):
            leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
            if leaves[0].dim() == 4:
                leaves = [t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in leaves]
            outputs = pytree.tree_leaves(run(*leaves))
            torch.stack([output.cos().sum() for output in outputs if output.requires_grad]).sum().backward()
            results.append([*outputs, *(t.grad for t in leaves if t.grad is not None)])
        torch.testing.assert_close(*results)
