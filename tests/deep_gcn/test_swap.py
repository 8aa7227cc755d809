"""swap.graph_conv on PyG's models, and knn_graph."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.nn import MLP

from paper_layers import knn, swap
from paper_layers.deep_gcn import DynamicEdgeConv, knn_graph
from paper_layers.deep_gcn import pyg as fused
from tests.ops.test_neighbor_reduce import features


class Dynamic(pyg.DynamicEdgeConv):
    """PyG's dynamic convolution without pyg-lib: neighbours from all distances in float64, PyG's messages."""

    def __init__(self, network: nn.Module, k: int, aggr: str = "max"):
        pyg.MessagePassing.__init__(self, aggr)
        self.nn, self.k, self.num_workers = network, k, 1

    def forward(self, x: Any, batch: Any = None) -> Tensor:
        points, queries = x if isinstance(x, tuple) else (x, x)
        one, two = batch if isinstance(batch, tuple) else (batch, batch)
        distance = (queries.double()[:, None] - points.double()).square().sum(-1)
        if one is not None and two is not None:
            distance = distance.masked_fill(two[:, None] != one, torch.inf)
        found = distance.sort(stable=True, dim=1)
        target, column = found.values[:, : self.k].isfinite().nonzero(as_tuple=True)
        return self.propagate(torch.stack([found.indices[target, column], target]), x=(points, queries))


def unpickled(model: nn.Module) -> nn.Module:
    """Return the model as from a computer with pyg-lib: PyG's constructor raises an error here."""
    for module in model.modules():
        if isinstance(module, Dynamic):
            module.__class__ = pyg.DynamicEdgeConv
    return pickle.loads(pickle.dumps(model))


class DGCNN(nn.Module):
    """A smaller version of the classifier of PyG's examples."""

    def __init__(self, aggr: str = "max"):
        super().__init__()
        self.conv1 = Dynamic(MLP([2 * 3, 16, 16]), 6, aggr)
        self.conv2 = Dynamic(MLP([2 * 16, 32]), 6, aggr)
        self.linear = nn.Linear(48, 5)

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        first = self.conv1(x, batch)
        second = self.conv2(first, batch)
        return self.linear(pyg.global_max_pool(torch.cat([first, second], 1), batch))


NETWORKS = {
    "linear": lambda: nn.Linear(8, 7),
    "act": lambda: nn.Sequential(nn.Linear(8, 7), nn.LeakyReLU(0.1)),
    "norm and act": lambda: nn.Sequential(nn.Linear(8, 7, bias=False), nn.BatchNorm1d(7), nn.PReLU()),
    "act and norm": lambda: nn.Sequential(nn.Linear(8, 7), nn.ReLU(), pyg.BatchNorm(7), nn.Dropout(0.0)),
    "two layers": lambda: nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Sequential(nn.Linear(7, 3), nn.Tanh())),
    "mlp": lambda: MLP([8, 7, 6], plain_last=False, act="leaky_relu", act_first=True),
    "one layer of mlp": lambda: MLP([8, 7], plain_last=False),
    "no linear layer first": lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 7)),
    "two norms": lambda: nn.Sequential(nn.Linear(8, 7), nn.BatchNorm1d(7), nn.BatchNorm1d(7)),
}


def negate_some(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)


def check_same(host: nn.Module, inputs: tuple[Any, ...], x: Tensor) -> None:
    """Compare outputs, gradients and buffers in training and in evaluation."""
    host = host.double()
    negate_some(host)
    swapped = swap.graph_conv(unpickled(copy.deepcopy(host)))
    for training in (True, False):
        results = []
        for model in (host.train(training), swapped.train(training)):
            output = model(*inputs)
            results.append((output, *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        for (name, a), b in zip(host.state_dict().items(), swapped.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("aggr", ["max", "mean", "add"])
def test_edge_conv(name: str, aggr: str) -> None:
    torch.manual_seed(0)
    x = features(60, 4).double().requires_grad_()
    edges = knn_graph(x, 5)
    edges = edges[:, torch.randperm(edges.shape[1])][:, 10:]  # In any order, not the same number for each node.
    check_same(pyg.EdgeConv(NETWORKS[name](), aggr), (x, edges), x)
    check_same(pyg.EdgeConv(NETWORKS[name](), aggr, flow="target_to_source"), (x, edges.flip(0)), x)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("aggr", ["max", "mean"])
def test_dynamic_edge_conv(name: str, aggr: str) -> None:
    torch.manual_seed(0)
    x = features(60, 4).double().requires_grad_()
    batch = torch.tensor([0] * 20 + [1] * 3 + [2] * 37)
    check_same(Dynamic(NETWORKS[name](), 5, aggr), (x, batch), x)
    check_same(Dynamic(NETWORKS[name](), 5, aggr), (x,), x)
    points = features(40, 4, seed=3).double()
    batches = (torch.arange(2).repeat_interleave(20), torch.arange(2).repeat_interleave(30))
    check_same(Dynamic(NETWORKS[name](), 5, aggr), ((points, x), batches), x)


def test_dgcnn() -> None:
    torch.manual_seed(0)
    x = features(80, 3).double().requires_grad_()
    batch = torch.arange(4).repeat_interleave(20)
    for aggr in ("max", "mean"):
        check_same(DGCNN(aggr), (x, batch), x)


def test_hubs_and_pairs_stay_edge_by_edge() -> None:
    x = features(50, 4).double().requires_grad_()
    star = torch.stack([torch.arange(50), torch.zeros(50, dtype=torch.int64)])
    check_same(pyg.EdgeConv(NETWORKS["act"]()), (x, star), x)
    few = features(7, 4, seed=1).double()
    edges = torch.stack([torch.randint(50, (28,)), torch.arange(7).repeat_interleave(4)])
    check_same(pyg.EdgeConv(NETWORKS["act"]()), ((x, few), edges), x)
    check_same(pyg.EdgeConv(NETWORKS["act"]()), (x, star[:, :0]), x)


def test_keeps_what_the_host_had() -> None:
    host = unpickled(DGCNN()).eval()
    host.conv2.nn.requires_grad_(False)
    called = []
    host.conv1.register_forward_hook(lambda *_: called.append("conv1"))
    host.conv1.nn.lins[1].register_forward_hook(lambda *_: called.append("inside"))
    before, keys = dict(host.named_parameters()), list(host.state_dict())
    assert swap.graph_conv(host) is host
    assert type(host.conv1) is fused.DynamicEdgeConv
    assert all(before[name] is p for name, p in host.named_parameters())
    assert (keys, host.conv1.training, host.conv2.nn.lins[0].weight.requires_grad) == (
        list(host.state_dict()),
        False,
        False,
    )
    x, batch = features(40, 3), torch.arange(2).repeat_interleave(20)
    expected = host(x, batch)
    assert called == ["inside", "conv1"]
    host.conv2.nn.register_forward_hook(lambda *_: called.append("container"))
    torch.testing.assert_close(host(x, batch), expected)
    assert called[2:] == ["inside", "conv1", "container"]
    assert swap.graph_conv(host) is host  # Nothing is left to swap.
    torch.testing.assert_close(copy.deepcopy(host)(x, batch), expected)
    assert "DynamicEdgeConv(nn=MLP(6, 16, 16), k=6)" in repr(host)
    conv = swap.graph_conv(pyg.EdgeConv(nn.Linear(6, 4)))
    twin = pickle.loads(pickle.dumps(conv))
    edges = knn_graph(x, 4)
    torch.testing.assert_close(twin(x, edges), conv(x, edges))


@pytest.mark.parametrize("aggr", ["max", "add"])
@pytest.mark.parametrize("network", ["act", "no linear layer first"])
def test_trains_on_a_sparse_adjacency(network: str, aggr: str) -> None:
    torch.manual_seed(0)
    host = pyg.EdgeConv(NETWORKS[network](), aggr).double()
    ours = swap.graph_conv(copy.deepcopy(host))
    points, queries = features(20, 4).double(), features(30, 4).double()
    edges = torch.stack([torch.randint(30, (120,)), torch.randint(20, (120,))])
    adjacency = torch.sparse_coo_tensor(edges, torch.ones(120), (30, 20))
    grads = []
    for conv in (host, ours):
        inputs = (points.clone().requires_grad_(), queries.clone().requires_grad_())
        output = conv(inputs, adjacency.coalesce())
        output.square().sum().backward()
        grads.append([output, *(t.grad for t in inputs), *(p.grad for p in conv.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    for conv in (host, ours):
        with pytest.raises(ValueError, match="size"):
            conv((points, queries[1:]), adjacency.coalesce())
        with pytest.raises(RuntimeError, match="uncoalesced"):
            conv((points, queries), adjacency)


def test_filter_and_nothing_to_swap() -> None:
    host = swap.graph_conv(unpickled(DGCNN()), filter_fn=lambda module, name: name == "conv2")
    assert (type(host.conv1), type(host.conv2)) == (pyg.DynamicEdgeConv, fused.DynamicEdgeConv)
    with pytest.raises(ValueError, match="at least one PyG EdgeConv or DynamicEdgeConv to swap, got none in Linear"):
        swap.graph_conv(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model: expected a Module, got int"):
        swap.graph_conv(3)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_knn_graph(loop: bool, cosine: bool) -> None:
    x, batch = features(50, 5), torch.tensor([0] * 20 + [1] * 3 + [2] * 27)
    edges = knn_graph(x, 4, batch, loop, cosine=cosine)
    index = knn(x, k=4, batch=batch, metric="cosine" if cosine else "sqeuclidean", include_self=loop)[0]
    assert edges.shape == (2, 20 * 4 + 3 * (3 if loop else 2) + 27 * 4)
    assert torch.equal(batch[edges[0]], batch[edges[1]])
    assert bool((edges[0] == edges[1]).any()) == loop
    assert torch.equal(edges[0, :80].view(20, 4), index[:20])
    assert torch.equal(knn_graph(x, 4, batch, loop, "target_to_source", cosine), edges.flip(0))


def test_a_dynamic_convolution_of_our_own() -> None:
    """This environment has neither pyg-lib nor torch-cluster."""
    with pytest.raises(ImportError, match="requires 'pyg-lib"):
        pyg.DynamicEdgeConv(nn.Linear(6, 4), k=3)
    torch.manual_seed(0)
    host = Dynamic(NETWORKS["norm and act"](), 5).double()
    ours = DynamicEdgeConv(copy.deepcopy(host.nn), k=5).double()
    ours.load_state_dict(host.state_dict())
    assert isinstance(ours, pyg.DynamicEdgeConv)
    x, batch = features(40, 4).double(), torch.arange(2).repeat_interleave(20)
    torch.testing.assert_close(ours(x, batch), host(x, batch))
    torch.testing.assert_close(ours(x, batch.int()), host(x, batch))
    twin = pickle.loads(pickle.dumps(ours.eval()))
    torch.testing.assert_close(copy.deepcopy(twin)(x), ours(x))
    assert swap.graph_conv(ours) is ours
    assert repr(ours).startswith("DynamicEdgeConv(nn=Sequential(")
    with pytest.raises(ValueError, match="x: expected shape"):
        ours(x[None])
    with pytest.raises(TypeError, match="k: expected an int"):
        DynamicEdgeConv(nn.Linear(6, 4), k=1.5)


class Adapter(nn.Linear):
    """A subclass with its own forward, like microsoft/LoRA's."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.low = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.low.T


HOOKS = [f"{step}_forward{when}" for step in ("propagate", "message", "aggregate") for when in ("_pre", "")]


def double_messages(conv: Any) -> None:
    conv.message = lambda x_i, x_j: 2 * type(conv).message(conv, x_i, x_j)


def patch_linear(conv: Any) -> None:
    conv.nn[0].forward = lambda x, old=conv.nn[0].forward: 2 * old(x)


CHANGES = {
    **{f"{hook}_hook": (lambda conv, hook=hook: getattr(conv, f"register_{hook}_hook")(double)) for hook in HOOKS},
    "message": double_messages,
    "aggregate": lambda conv: setattr(conv, "aggregate", lambda x, index, dim_size, **_: x[:dim_size] * 3),
    "update": lambda conv: setattr(conv, "update", lambda x, **_: x * 3),
    "aggr_module": lambda conv: setattr(conv, "aggr_module", pyg.MedianAggregation()),
    "aggr_module's hook": lambda conv: conv.aggr_module.register_forward_hook(lambda *a: a[2] * 2),
    "decomposed_layers": lambda conv: setattr(conv, "decomposed_layers", 2),
    "adapter": lambda conv: conv.nn.__setitem__(0, Adapter(8, 7)),
    "forward of the first layer": patch_linear,
    "hook of the activation": lambda conv: conv.nn[1].register_forward_hook(lambda *a: a[2] * 2),
    "hook of the network": lambda conv: conv.nn.register_forward_hook(lambda *a: a[2] * 2),
    "another activation": lambda conv: conv.nn.__setitem__(1, nn.Softplus()),
    "a slope for each channel": lambda conv: conv.nn.__setitem__(1, nn.PReLU(7)),
    "a falling activation": lambda conv: conv.nn.__setitem__(1, nn.LeakyReLU(-0.5)),
    "node_dim": lambda conv: setattr(conv, "node_dim", 0),
}


def double(module: nn.Module, inputs: Any, output: Any = None) -> Any:
    """Double the values in a hook or pre-hook of PyG."""
    if isinstance(output, Tensor):
        return output * 2
    if len(inputs) == 3:
        edges, size, arguments = inputs
        return edges, size, {"x": tuple(2 * part for part in arguments["x"])}
    return {
        key: 2 * value if value.is_floating_point() else value for key, value in inputs[0].items() if value is not None
    }


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_pygs_own_path_where_it_is_needed(change: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 7), nn.ReLU())
    if change == "decomposed_layers":
        network = nn.Sequential(nn.Linear(4, 7), nn.ReLU())
    host = (Dynamic(network, 5) if dynamic else pyg.EdgeConv(network)).double()
    x = features(40, 4).double()
    arguments = (x,) if dynamic else (x, knn_graph(x, 5))
    plain = host(*arguments) if change != "decomposed_layers" else None
    ours = swap.graph_conv(unpickled(copy.deepcopy(host)))
    for conv in (host, ours):
        torch.manual_seed(1)
        CHANGES[change](conv.double())
        conv.double()
    results = []
    for conv in (host, ours):
        try:
            results.append(conv(*arguments))
        except Exception as error:  # PyG itself can't decompose a pair.
            results.append(error)
    if isinstance(results[0], Tensor):
        torch.testing.assert_close(results[1], results[0])
        assert change == "node_dim" or not torch.allclose(results[0], plain)
    else:
        assert isinstance(results[1], Exception)


@pytest.mark.parametrize("step", ["forward", "message", "aggregate", "update"])
@pytest.mark.parametrize("kind", [pyg.EdgeConv, pyg.DynamicEdgeConv])
def test_methods_set_on_pygs_class(kind: Any, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host, called = nn.Sequential(nn.Linear(8, 7), nn.ReLU()), []
    conv = swap.graph_conv(unpickled(Dynamic(host, 5) if kind is pyg.DynamicEdgeConv else pyg.EdgeConv(host)))
    old = getattr(kind, step)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(step)
        return args[0] if step == "forward" else old(self, *args, **kwargs)

    monkeypatch.setattr(kind, step, functools.wraps(old)(changed))
    x = features(40, 4)
    conv(x) if kind is pyg.DynamicEdgeConv else conv(x, knn_graph(x, 5))
    assert called == [step]
