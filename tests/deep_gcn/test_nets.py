from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paper_layers import knn
from paper_layers.deep_gcn import (
    DeepGCN,
    DeepGCNClassifier,
    DeepGCNPartSegmenter,
    DenseGCNBlock,
    DilatedKNN,
    PlainGCNBlock,
    ResGCNBlock,
    StaticDeepGCN,
    from_edge_index,
    load_official,
    to_edge_index,
)
from testing.official import deep_gcn as official
from tests.ops.test_neighbor_reduce import features, table

FORMS = {"points": DeepGCN, "cloud": DeepGCNClassifier, "parts": DeepGCNPartSegmenter}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts() -> None:
    """The counts of the official models."""
    expected = {
        "ResGCN": ([DeepGCN(9, 13, blocks=n, device="meta") for n in (7, 14, 28, 56, 112)],
                   [1_403_853, 2_150_669, 3_644_301, 6_631_565, 12_606_093]),
        "wide, plain, mr, dense": (
            [DeepGCN(9, 13, device="meta", **s) for s in (
                {"channels": 128}, {"block": "plain"}, {"conv": "mr"}, {"block": "dense", "channels": 32})],
            [7_066_893, 3_644_301, 3_644_301, 21_397_197]),
        "ModelNet40": ([DeepGCNClassifier(3, 40, blocks=n, device="meta") for n in (7, 14, 28)],
                       [1_703_848, 2_221_288, 3_256_168]),
        "PartNet": ([DeepGCNPartSegmenter(3, 15, device="meta")], [3_774_031]),
        "PPI": (
            [StaticDeepGCN(50, 121, channels=c, blocks=n, block=b, device="meta")
             for b, n, c in (("res", 14, 64), ("res", 28, 256), ("res", 112, 256), ("dense", 14, 256))],
            [1_657_849, 14_762_105, 58_866_809, 53_417_593]),
    }  # fmt: skip
    for name, (models, numbers) in expected.items():
        assert [count(m) for m in models] == numbers, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["res", "dense", "plain"])
@pytest.mark.parametrize("conv", ["edge", "mr"])
def test_equals_official(form: str, kind: str, conv: str) -> None:
    """In float64: networks on dynamic graphs amplify the rounding of float32."""
    theirs = official.randomize(official.Net(form, 6, 5, 8, 4, kind, conv, drop=0)).double()
    ours = FORMS[form](6, 5, channels=8, blocks=4, block=kind, conv=conv, k=8, dropout=0, stochastic=False).double()
    load_official(ours, theirs.state_dict())
    x = features(2, 60, 6).double()
    for training in (False, True):
        theirs.train(training)
        ours.train(training)
        expected = theirs(x.mT[..., None])
        expected = expected if form == "cloud" else expected.mT
        actual = ours(x)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        flat, ptr = x.flatten(0, 1), torch.tensor([0, 60, 120])
        torch.testing.assert_close(ours(flat, ptr=ptr).view_as(actual), actual)
        batch = torch.arange(2).repeat_interleave(60)
        torch.testing.assert_close(ours(flat, batch).view_as(actual), actual)
    actual.square().sum().backward()
    expected.square().sum().backward()
    want = dict(theirs.named_parameters())
    own = {"head.conv.nn.linear.weight": "head.gconv.nn.0.weight", "fusion.linear.weight": "fusion_block.0.weight"}
    own |= {"prediction.0.linear.weight": "prediction.0.0.weight"}
    own |= {"blocks.2.conv.nn.norm.weight": "backbone.2.body.gconv.nn.2.weight"}
    for name, their_name in own.items():
        grad = dict(ours.named_parameters())[name].grad
        torch.testing.assert_close(grad, want[their_name].grad.view_as(grad), rtol=1e-5, atol=1e-6, msg=name)


def test_ragged_clouds_do_not_touch() -> None:
    """In eval mode, a cloud gets the same labels alone and among others."""
    clouds = [features(n, 6) for n in (30, 1, 45)]
    x, ptr = torch.cat(clouds).double(), torch.tensor([0, 30, 31, 76])
    for form in FORMS.values():
        net = form(6, 5, channels=8, blocks=3, k=4).double().eval()
        alone = torch.cat([net(cloud.double()[None])[:, None].flatten(0, -2) for cloud in clouds])
        torch.testing.assert_close(net(x, ptr=ptr), alone)


def test_static_graph() -> None:
    edges = to_edge_index(table(40, 6, rows=40))
    index, x = from_edge_index(edges, 40), features(40, 10).double()
    for block in ("res", "dense", "plain"):
        net = StaticDeepGCN(10, 4, channels=8, blocks=4, block=block, conv="mr", dropout=0, order="norm_act").double()
        output = net(x, index)
        torch.testing.assert_close(net(x, edge_index=edges), output)
        assert output.shape == (40, 4)
    with pytest.raises(ValueError, match="index: expected either index or edge_index, got none"):
        net(x)


def test_blocks() -> None:
    x = features(2, 50, 8)
    settings: dict[str, Any] = {"k": 5, "dilation": 3}
    index = knn(x, k=5, dilation=3)[0]
    for block in (PlainGCNBlock(8, 6, **settings), ResGCNBlock(8, **settings), DenseGCNBlock(8, growth=6, **settings)):
        block.eval()
        y = block.conv(x, index)
        expected = x + y if isinstance(block, ResGCNBlock) else y
        expected = torch.cat([x, y], -1) if isinstance(block, DenseGCNBlock) else expected
        torch.testing.assert_close(block(x), expected)
        torch.testing.assert_close(block(x, index), expected)
        flat, ptr = x.flatten(0, 1), torch.tensor([0, 50, 100])
        torch.testing.assert_close(block(flat, ptr=ptr), block(x).flatten(0, 1))
    theirs = official.randomize(official.Block("res", official.Edge(8, 8), 5, 3)).eval()
    ours = load_official(ResGCNBlock(8, **settings), theirs.state_dict()).eval()
    torch.testing.assert_close(ours(x), theirs(x.mT[..., None])[..., 0].mT, rtol=1e-4, atol=1e-4)


def test_dilations() -> None:
    def rates(**settings: Any) -> list[int]:
        return [b.knn.dilation for b in DeepGCN(3, 2, channels=4, blocks=6, device="meta", **settings).blocks]

    assert rates() == [1, 2, 3, 4, 5]
    assert rates(max_dilation=3) == [1, 2, 3, 3, 3]
    assert rates(dilations=lambda i: i // 4 + 1) == [1, 1, 1, 1, 2]
    assert rates(dilations=[2, 2, 4, 4, 8]) == [2, 2, 4, 4, 8]
    assert rates(block="plain") == [1] * 5
    plain = DeepGCN(3, 2, blocks=3, block="plain", device="meta")
    assert not any(b.knn.stochastic for b in plain.blocks)


def test_stochastic_dilation() -> None:
    x = features(2, 200, 3)
    every = knn(x, k=24)[0]
    graph = DilatedKNN(6, 4, stochastic=True, stochastic_probability=0.5)
    torch.manual_seed(0)
    kinds = []
    for _ in range(200):
        index = graph(x)
        stride = torch.equal(index, every[..., ::4])
        columns = [(every[0, 0] == j).nonzero().item() for j in index[0, 0]]
        assert torch.equal(index, every[..., columns])  # The same positions for all points and clouds.
        assert len(set(columns)) == 6
        kinds.append(stride)
    assert 70 < sum(kinds) < 130
    assert all(torch.equal(graph.eval()(x), every[..., ::4]) for _ in range(9))
    compiled = torch.compile(graph.train(), backend="aot_eager", fullgraph=True)
    found = [torch.equal(compiled(x), every[..., ::4]) for _ in range(30)]
    assert any(found)
    assert not all(found)


@pytest.mark.parametrize("form", [DeepGCN, DeepGCNClassifier])
def test_checkpointing_changes_nothing(form: type[nn.Module]) -> None:
    def step(checkpointing: bool) -> tuple[nn.Module, list[Tensor], int]:
        torch.manual_seed(0)
        net = form(6, 3, channels=16, blocks=5, k=4, checkpointing=checkpointing)
        kept = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = net(x).square().mean()
        loss.backward()
        return net, [p.grad for p in net.parameters()], kept

    x = features(2, 100, 6)
    (plain, grads, most), (saving, same, less) = step(False), step(True)
    for a, b in zip(grads, same, strict=True):
        torch.testing.assert_close(a, b)
    for (name, a), b in zip(plain.state_dict().items(), saving.state_dict().values(), strict=True):
        assert torch.equal(a, b), name  # Running statistics are updated once.
    assert less < most


@pytest.mark.parametrize("form", FORMS.values())
def test_compile_and_export(form: type[nn.Module]) -> None:
    net = form(6, 3, channels=8, blocks=3, k=4, stochastic=False, dropout=0)
    twin, x = copy.deepcopy(net), features(2, 40, 6)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(net.state_dict(), twin.state_dict())
    program = torch.export.export(net.eval(), (x,))
    torch.testing.assert_close(program.module()(x), net(x))
    ptr = torch.tensor([0, 30, 80])
    ragged = torch.compile(lambda x, ptr: net(x, ptr=ptr), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(ragged(x.flatten(0, 1), ptr), net(x.flatten(0, 1), ptr=ptr))


def test_copies() -> None:
    net = DeepGCN(6, 3, channels=8, blocks=3, k=4).eval()
    x = features(1, 40, 6)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
    assert net.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_too_few_points() -> None:
    """Small clouds have fewer neighbours."""
    net = DeepGCN(3, 2, channels=8, blocks=4, k=16).eval()
    for n in (1, 2, 20):
        assert net(features(2, n, 3)).isfinite().all()
    assert net(features(0, 5, 3)).shape == (0, 5, 2)
    net.train()(features(2, 20, 3)).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_bad_inputs() -> None:
    net = DeepGCN(6, 3, channels=8, blocks=2, k=4)
    x, ptr = features(20, 6), torch.tensor([0, 20])
    bad = [
        (lambda: net(features(20, 5)), ValueError, r"x: expected shape \(N, 6\) or \(B, N, 6\), got \(20, 5\)"),
        (lambda: net(x, torch.zeros(20, dtype=torch.int64), ptr), ValueError, "ptr: expected either batch or ptr"),
        (lambda: net(x[None], ptr=ptr), ValueError, r"ptr: expected None for x of shape \(B, N, C\)"),
        (lambda: net(x, torch.zeros(19, dtype=torch.int64)), ValueError, r"batch: expected shape \(20,\), got \(19,\)"),
        (lambda: net(x, torch.tensor([1, 0] * 10)), ValueError, "batch: .*ascending"),
        (lambda: net(x, torch.zeros(20)), TypeError, "batch: expected an int64 Tensor"),
        (lambda: net(x, ptr=torch.tensor([0, 21])), ValueError, "ptr: expected numbers from 0 to 20"),
        (lambda: DeepGCN(6, 3, block="deep"), ValueError, "block: expected res, dense or plain, got 'deep'"),
        (lambda: DeepGCN(6, 3, conv="gat"), ValueError, "conv: expected one of edge, mr, gin, sage, got 'gat'"),
        (lambda: DeepGCN(6, 3, blocks=0), ValueError, "blocks: expected at least 1, got 0"),
        (lambda: DeepGCN(6, 3, growth=8), ValueError, "growth: expected None with block='res', got 8"),
        (lambda: DeepGCN(6, 3, dilations=[1, 2]), ValueError, "dilations: expected one for each of the 27 blocks"),
        (lambda: DeepGCN(6, 3, max_dilation=0), ValueError, "max_dilation: expected at least 1, got 0"),
        (lambda: DilatedKNN(0), ValueError, "k: expected at least 1, got 0"),
        (lambda: DilatedKNN(4, 1.5), TypeError, "dilation: expected an int, got 1.5"),
        (
            lambda: DilatedKNN(4, 2, stochastic_probability=-1),
            ValueError,
            "stochastic_probability: expected from 0 to 1, got -1",
        ),
        (lambda: DilatedKNN(4, metric="l1"), ValueError, "metric: .*got 'l1'"),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("form", [DeepGCN, DeepGCNClassifier, DeepGCNPartSegmenter])
@pytest.mark.parametrize("training", [False, True])
def test_clouds_without_points(form: type[nn.Module], training: bool) -> None:
    net = form(3, 2, channels=8, blocks=2, k=3).train(training)
    per_cloud = form is DeepGCNClassifier
    if not (training and per_cloud):  # One cloud gives the classifier's norms one value per channel.
        output = net(torch.zeros(0, 3))
        assert output.shape == ((1, 2) if per_cloud else (0, 2))
        assert output.isfinite().all()
    output = net(torch.zeros(2, 0, 3))
    assert output.shape == ((2, 2) if per_cloud else (2, 0, 2))
    assert net(torch.zeros(0, 5, 3)).shape == ((0, 2) if per_cloud else (0, 5, 2))
    if not training:
        assert net(torch.rand(1, 3)).shape == (1, 2)
