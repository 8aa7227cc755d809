from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paper_layers import knn
from paper_layers.deep_gcn import EdgeConv, GINConv, MRConv, SAGEConv, from_edge_index, load_official, to_edge_index
from testing.official import deep_gcn as official
from tests.ops.test_neighbor_reduce import features, table

CONVS = {"edge": EdgeConv, "mr": MRConv, "gin": GINConv, "sage": SAGEConv}
convs = pytest.mark.parametrize("name", CONVS)


def pair(name: str, inputs: int = 6, outputs: int = 5, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Return the formula and our module, in float64, with the same weights."""
    theirs = official.randomize(official.CONVS[name](inputs, outputs, **settings)).double()
    ours = CONVS[name](inputs, outputs, **settings).double()
    return theirs, load_official(ours, theirs.state_dict())


@convs
@pytest.mark.parametrize("act", ["relu", "leakyrelu", "prelu", None])
@pytest.mark.parametrize("norm", ["batch", "instance", None])
@pytest.mark.parametrize("training", [True, False])
def test_equals_official(name: str, act: str | None, norm: str | None, training: bool) -> None:
    theirs, ours = pair(name, act=act, norm=norm)
    theirs.train(training)
    ours.train(training)
    x = features(2, 40, 6).double().requires_grad_()
    index = knn(x.detach(), k=7)[0]
    expected = theirs(x.mT[..., None], index)[..., 0].mT
    actual = ours(x, index)
    torch.testing.assert_close(actual, expected)
    grad = features(*expected.shape, seed=1).double()
    parameters = [p for _, p in sorted(load_names(theirs, ours))]
    own = [p for p, _ in sorted(load_names(theirs, ours))]
    want = torch.autograd.grad(expected, [x, *(dict(theirs.named_parameters())[n] for n in parameters)], grad)
    got = torch.autograd.grad(actual, [x, *(dict(ours.named_parameters())[n] for n in own)], grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-6, atol=1e-9)
    for a, b in load_names(theirs, ours, buffers=True):
        torch.testing.assert_close(ours.state_dict()[a], theirs.state_dict()[b])


def load_names(theirs: nn.Module, ours: nn.Module, buffers: bool = False) -> list[tuple[str, str]]:
    """Return pairs of our name and the official name, by loading numbers in place of values."""
    numbered = {key: torch.full_like(value, i) for i, (key, value) in enumerate(theirs.state_dict().items())}
    names = list(numbered)
    probe = load_official(copy.deepcopy(ours), numbered)
    source = probe.named_buffers() if buffers else probe.named_parameters()
    return [(name, names[int(value.flatten()[0])]) for name, value in source]


@convs
@pytest.mark.parametrize("order", ["act_norm", "norm_act"])
@pytest.mark.parametrize(("act", "slope"), [("relu", 0.0), ("prelu", -0.7), ("prelu", 1.8), (None, 1.0)])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_edges_agree_with_table(name: str, order: str, act: str | None, slope: float, norm: str) -> None:
    """Two clouds, with nodes that don't have neighbours; PyG runs on each edge."""
    conv = CONVS[name](6, 5, act=act, order=order, norm=norm).double()
    for module in conv.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        elif isinstance(module, nn.PReLU):
            nn.init.constant_(module.weight, slope)
    x = features(50, 6).double().requires_grad_()
    index = torch.cat([table(20, 7, rows=20), table(30, 7, rows=30) + 20])
    index[20:] = index[20:].where(index[20:] > 19, -1)
    index[3] = index[33] = -1
    ptr = torch.tensor([0, 20, 50])
    results = []
    for graph in ({"index": index}, {"edge_index": to_edge_index(index)}):
        output = conv(x, ptr=ptr, **graph)
        parameters = [x, *(p for p in conv.parameters() if p.requires_grad)]
        results.append((output, *torch.autograd.grad(output.square().sum(), parameters)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@convs
def test_nodes_without_neighbors(name: str) -> None:
    conv = CONVS[name](4, 3, norm=None)
    x = features(3, 4)
    none = conv(x, torch.full((3, 2), -1))
    assert none.isfinite().all()
    torch.testing.assert_close(none, conv(x, edge_index=torch.zeros(2, 0, dtype=torch.int64)))
    if name == "edge":
        assert (none == 0).all()


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["batch", None])
def test_mean_sage_of_the_sparse_code(relative: bool, bias: bool, norm: str | None) -> None:
    conv = SAGEConv(6, 5, reduction="mean", relative=relative, norm=norm, bias=bias).double()
    generator = torch.Generator().manual_seed(0)
    state = {"weight": torch.randn(6, 5, generator=generator), "nn.0.weight": torch.randn(5, 11, generator=generator)}
    if bias:
        state |= {"bias": torch.randn(5, generator=generator), "nn.0.bias": torch.randn(5, generator=generator)}
    if norm:
        state |= {"nn.2.weight": torch.randn(5, generator=generator), "nn.2.bias": torch.zeros(5)}
        state |= {"nn.2.running_mean": torch.zeros(5), "nn.2.running_var": torch.ones(5)}
    state = {key: value.double() for key, value in state.items()}
    load_official(conv, {f"gconv.{key}": value for key, value in state.items()})
    x, index = features(30, 6).double(), table(30, 4, rows=30)
    rows = []
    for i in range(30):
        around = [*(j for j in index[i].tolist() if j >= 0 and j != i), i]
        messages = x[around] - x[i] if relative else x[around]
        rows.append((messages @ state["weight"]).mean(0))
    z = F.linear(torch.cat([x, torch.stack(rows)], 1), state["nn.0.weight"], state.get("nn.0.bias")).relu()
    if norm:
        z = F.batch_norm(z, None, None, state["nn.2.weight"], state["nn.2.bias"], training=True)
    z = z + state["bias"] if bias else z
    expected = F.normalize(z, dim=-1) if norm else z
    torch.testing.assert_close(conv(x, index), expected)
    torch.testing.assert_close(conv(x, edge_index=to_edge_index(index)), expected)


@convs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(name: str, dtype: torch.dtype) -> None:
    conv = CONVS[name](16, 8)
    x = features(2, 60, 16)
    index = knn(x, k=5)[0]
    expected = copy.deepcopy(conv).double()(x.double(), index)
    half = copy.deepcopy(conv).to(dtype)(x.to(dtype), index)
    assert half.dtype == dtype
    torch.testing.assert_close(half.double(), expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=dtype):
        mixed = conv(x, index)
    torch.testing.assert_close(mixed.double(), expected, rtol=0.1, atol=0.1)
    mixed.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in conv.parameters())


@convs
def test_compile(name: str) -> None:
    conv = CONVS[name](6, 5)
    x = features(2, 30, 6).requires_grad_()
    index = knn(x.detach(), k=4)[0]
    twin = copy.deepcopy(conv)
    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
    for module in (compiled, twin):
        module(x, index).square().sum().backward()
    for (key, a), b in zip(conv.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    for a, b in zip(conv.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@convs
def test_copies_and_meta(name: str) -> None:
    conv = CONVS[name](6, 5, act="prelu", device="meta")
    assert all(p.is_meta for p in conv.parameters())
    assert conv(torch.ones(9, 6, device="meta"), torch.ones(9, 3, dtype=torch.int64, device="meta")).shape == (9, 5)
    real = conv.to_empty(device="cpu")
    for module in real.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    real.reset_parameters()
    assert all(p.isfinite().all() for p in real.parameters())
    x, index = features(9, 6), table(9, 3, rows=9)
    torch.testing.assert_close(copy.deepcopy(real)(x, index), real(x, index))


def test_edge_conv_keeps_its_digits_and_stores_no_edge() -> None:
    """An offset of 1e4 and a variance of 1; no saved tensor is as large as N x k x C."""
    conv = EdgeConv(8, 16)
    x = features(400, 8)
    index = knn(x, k=30)[0]
    shifted = copy.deepcopy(conv)
    with torch.no_grad():
        shifted.nn.linear.bias += 1e4
    exact = copy.deepcopy(shifted).double()(x.double(), index)
    torch.testing.assert_close(shifted(x, index).double(), exact, rtol=0, atol=5e-3)  # One bit of 1e4 is 1e-3.
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        conv(x.requires_grad_(), index)
    assert max(t.numel() for t in kept if t.is_floating_point()) <= 400 * 16


def test_running_statistics_are_those_of_all_edges() -> None:
    conv, x, index = EdgeConv(4, 3, act=None), features(30, 4), table(30, 5, rows=30)
    index[7] = -1
    conv(x, index)
    edges = to_edge_index(index)
    z = conv.nn.linear(torch.cat([x[edges[1]], x[edges[0]] - x[edges[1]]], 1))
    torch.testing.assert_close(conv.nn.norm.running_mean, 0.1 * z.mean(0))
    torch.testing.assert_close(conv.nn.norm.running_var, 0.9 + 0.1 * z.var(0))
    conv.nn.norm.momentum = None  # The mean of all batches.
    conv.nn.norm.reset_running_stats()
    for _ in range(3):
        conv(x, index)
    torch.testing.assert_close(conv.nn.norm.running_mean, z.mean(0))


@convs
def test_bad_inputs(name: str) -> None:
    conv, x, index = CONVS[name](4, 3), features(9, 4), table(9, 2, rows=9)
    edges = to_edge_index(index)
    bad = [
        (lambda: conv(x), ValueError, "index: expected either index or edge_index, got none"),
        (lambda: conv(x, index, edge_index=edges), ValueError, "index: .*got both"),
        (lambda: conv(features(9, 5), index), ValueError, r"x: expected shape \(N, 4\).*got \(9, 5\)"),
        (lambda: conv(x.long(), index), TypeError, "x: .*torch.int64"),
        (lambda: conv(x[None], edge_index=edges), ValueError, r"x: expected shape \(N, C\) with edge_index"),
        (lambda: conv(x, edge_index=edges[0]), ValueError, r"edge_index: expected shape \(2, E\)"),
        (lambda: conv(x, index.float()), TypeError, "index: expected an int64"),
        (lambda: conv(x, index + 9), RuntimeError, "index: expected -1 or a row below 9"),
        (lambda: CONVS[name](0, 3), ValueError, "in_channels: expected at least 1, got 0"),
        (lambda: CONVS[name](4, 3, act="gelu"), ValueError, "act: .*got 'gelu'"),
        (lambda: CONVS[name](4, 3, norm="layer"), ValueError, "norm: .*got 'layer'"),
        (lambda: CONVS[name](4, 3, order="norm"), ValueError, "order: .*got 'norm'"),
        (lambda: CONVS[name](4, 3, dropout=2), ValueError, "dropout: .*got 2"),
        (lambda: conv(x[:1], torch.zeros(1, 1, dtype=torch.int64)), ValueError, "more than (one|1) value"),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()


def test_checkpoints_that_do_not_fit() -> None:
    theirs = official.Edge(6, 5).state_dict()
    with pytest.raises(ValueError, match=r"unexpected nn\.2\.weight"):
        load_official(EdgeConv(6, 5, order="norm_act"), theirs)
    with pytest.raises(ValueError, match=r"nn\.0\.weight of shape \(5, 12, 1, 1\) where nn\.linear\.weight has"):
        load_official(EdgeConv(7, 5), theirs)
    with pytest.raises(TypeError, match="state_dict: expected a mapping or a path, got int"):
        load_official(EdgeConv(6, 5), 3)
    prefixed = {f"module.gconv.{key}": value for key, value in theirs.items()}
    loaded = load_official(EdgeConv(6, 5), {"state_dict": prefixed})
    assert torch.equal(loaded.nn.linear.weight, theirs["nn.0.weight"][..., 0, 0])


def test_dropout_drops_channels_of_clouds() -> None:
    conv = EdgeConv(4, 64, norm=None, dropout=0.5)
    x = features(2, 30, 4)
    index = knn(x, k=3)[0]
    dense = conv(x, index)
    dropped = (dense == 0).all(1)
    assert 20 < dropped.sum() < 108
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dense, 2 * conv.eval()(x, index) * ~dropped[:, None])
    flat, ptr = x.flatten(0, 1), torch.tensor([0, 30, 60])
    ragged = conv.train()(flat, knn(flat, k=3, ptr=ptr)[0], ptr=ptr).view(2, 30, 64)
    assert 20 < (ragged == 0).all(1).sum() < 108


def test_edge_index_of_either_order() -> None:
    conv, x = MRConv(4, 3).eval(), features(6, 4)
    edges = torch.tensor([[1, 2, 5, 0], [0, 0, 3, 3]])
    permuted = edges[:, [2, 0, 3, 1]]
    torch.testing.assert_close(conv(x, edge_index=edges), conv(x, edge_index=permuted))
    torch.testing.assert_close(conv(x, edge_index=edges), conv(x, from_edge_index(edges, 6)))


@pytest.mark.parametrize("order", ["act_norm", "norm_act"])
@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.LeakyReLU(-0.5), nn.PReLU(1, -0.8), nn.PReLU(5, -0.3), nn.GELU(), nn.Softplus(), None]
)
@pytest.mark.parametrize("norm", ["batch", "instance", None])
def test_largest_edge_of_any_activation(order: str, act: nn.Module | None, norm: str | None) -> None:
    """Also of a decreasing activation, where the smallest edge may become the largest, and of a user's own."""
    torch.manual_seed(0)
    for kind in (EdgeConv, SAGEConv):
        conv = kind(5, 5, norm=norm, order=order).double()
        layer = conv.nn if kind is EdgeConv else conv.nn1
        layer.act = copy.deepcopy(act)
        for module in conv.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.weight)
        conv.double()
        x, index = features(30, 5).double(), table(30, 4, rows=30)
        rows = torch.cat([x[:, None].expand(-1, 4, -1), x[index.clamp(min=0)] - x[:, None]], -1)
        rows = rows if kind is EdgeConv else x[index.clamp(min=0)]
        z, there = layer.linear(rows), (index >= 0)[..., None]
        call = act or nn.Identity()
        call = call.double()
        for first in (order == "act_norm", order != "act_norm"):
            if first:
                z = call(z.flatten(0, 1)).view(z.shape)
            elif norm is not None:
                edges = z[there.expand_as(z)].view(-1, 5)
                factor = layer.norm.weight if norm == "batch" else 1
                z = (z - edges.mean(0)) / (edges.var(0, correction=0) + 1e-5).sqrt() * factor
        largest = z.masked_fill(~there, -torch.inf).amax(1).where(there.any(1), 0)
        expected = largest if kind is EdgeConv else conv.nn2(torch.cat([x, largest], 1))
        torch.testing.assert_close(conv(x, index), expected)
        torch.testing.assert_close(conv(x, edge_index=to_edge_index(index)), expected)


def empty_graphs(form: str) -> list[dict[str, Tensor]]:
    none = torch.zeros(2, 0, dtype=torch.int64)
    if form == "edges":
        return [{"x": torch.randn(5, 4), "edge_index": none}, {"x": torch.zeros(0, 4), "edge_index": none}]
    return [{"x": torch.randn(n, 4), "index": torch.full((n, k), -1)} for n, k in ((5, 3), (5, 0), (0, 3))]


@pytest.mark.parametrize("form", ["edges", "table"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("synchronized", [False, True])
def test_statistics_stay_on_graphs_without_edges(form: str, momentum: float | None, synchronized: bool) -> None:
    conv, norm = EdgeConv(4, 3), nn.BatchNorm1d(3, momentum=momentum)
    conv.nn.norm = norm
    if synchronized:
        conv = nn.SyncBatchNorm.convert_sync_batchnorm(conv)
    conv(features(9, 4), table(9, 3, rows=9))
    before = {name: buffer.clone() for name, buffer in conv.named_buffers()}
    for graph in empty_graphs(form):
        output = conv(**graph)
        assert torch.equal(output, torch.zeros(len(graph["x"]), 3))
        output.sum().backward()
    batches = before.pop("nn.norm.num_batches_tracked")
    for name, buffer in before.items():
        assert torch.equal(conv.get_buffer(name), buffer)
    nn.BatchNorm1d(3)(torch.zeros(0, 3))  # Torch counts an empty batch too.
    assert conv.nn.norm.num_batches_tracked == batches + len(empty_graphs(form))
    assert conv(**empty_graphs(form)[0]).isfinite().all()


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_one_edge_has_no_statistics(norm: str) -> None:
    conv, index = EdgeConv(4, 3, norm=norm), torch.full((5, 3), -1)
    index[2, 1] = 3
    x = features(5, 4)
    for graph in ({"index": index}, {"edge_index": to_edge_index(index)}):
        with pytest.raises(ValueError, match=r"more than (one|1) value"):
            conv(x, **graph)
    if norm == "batch":
        assert conv.eval()(x, index).isfinite().all()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("form", ["index", "edge_index"])
def test_running_statistics_of_float64_are_exact(momentum: float | None, form: str) -> None:
    conv = EdgeConv(4, 3, norm="batch").double()
    conv.nn.norm.momentum = momentum
    twin = nn.BatchNorm1d(3, momentum=momentum).double()
    x, index = features(30, 4).double(), table(30, 4, rows=30)
    source, target = to_edge_index(index)
    for _ in range(3):
        conv(x, **{form: index if form == "index" else to_edge_index(index)})
        twin(conv.nn.act(conv.nn.linear(torch.cat([x[target], x[source] - x[target]], 1))))
    for a, b in zip(conv.nn.norm.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["edge", "mr", "sage"])
def test_statistics_move_once_under_checkpointing(name: str, reentrant: bool) -> None:
    conv = CONVS[name](4, 4)
    twin = copy.deepcopy(conv)
    hooked = next(m for m in conv.modules() if isinstance(m, nn.BatchNorm1d))
    if name == "mr":
        hooked.register_forward_hook(lambda *_: None)
    x, index = features(9, 4).requires_grad_(), table(9, 3, rows=9)
    output = checkpoint(conv, x, index, use_reentrant=reentrant)
    output.square().sum().backward()
    twin(x, index).square().sum().backward()
    torch.testing.assert_close(conv.state_dict(), twin.state_dict())
    for a, b in zip(conv.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_refuses_nodes_that_do_not_exist() -> None:
    x = features(5, 4)
    for name, kind in CONVS.items():
        for wrong in (-1, 5):
            for row in (0, 1):
                edges = torch.tensor([[0, 1], [2, 3]])
                edges[row, 1] = wrong
                with pytest.raises(ValueError, match=f"edge_index: expected nodes from 0 to 4, got .*{wrong}"):
                    kind(4, 4)(x, edge_index=edges), name
    with pytest.raises(ValueError, match="index: expected nodes from 0 to 2, got 0 to 3"):
        to_edge_index(torch.tensor([[[1], [-1], [3]], [[0], [1], [2]]]))


@convs
def test_compiles_for_other_sizes(name: str) -> None:
    """Sizes become symbolic at the second call; the sum's backward needs one that its forward does not use."""
    torch._dynamo.reset()
    conv = CONVS[name](6, 5).eval()
    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
    for rows in (30, 20, 25):
        x = features(rows, 6).requires_grad_()
        index = knn(x.detach(), k=4)[0]
        (got,), (want,) = (torch.autograd.grad(f(x, index).square().sum(), x) for f in (compiled, conv))
        torch.testing.assert_close(got, want)
