"""Every public module with layers inside, small: how to build it, its input, and how to run it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paper_layers import (
    LIPPool2d,
    SplitBatchNorm1d,
    SplitBatchNorm2d,
    SplitBatchNorm3d,
    adv_prop,
    big_bigan,
    deep_gcn,
    lip,
    point_rend,
)
from paper_layers.adv_prop import SplitBatchNorm
from paper_layers.deep_gcn.nets import Prediction
from paper_layers.lip.densenet import DenseLayer
from tests.ops.test_neighbor_reduce import table

Run = Callable[[Any, Tensor], Tensor]
FACTORY: dict[str, Any] = {"dtype": torch.float64}
PLAIN: dict[str, Any] = {"spectral_norm": False, "hidden_features": 6, "depth": 2, **FACTORY}
NET: dict[str, Any] = {"channels": 6, "blocks": 2, "k": 3, "dropout": 0.0, "stochastic": False, **FACTORY}


def narrow(net: Any, inputs: int) -> nn.Module:
    """The network with a few channels in its last layers, of which there are a million otherwise."""
    net.fusion = deep_gcn.Perceptron(12, 8)
    last = deep_gcn.Perceptron(5, 3, act=None, norm=None)
    net.prediction = Prediction(deep_gcn.Perceptron(inputs, 7), deep_gcn.Perceptron(7, 5), nn.Dropout(0.0), last)
    return net


def on_table(conv: Any, x: Tensor) -> Tensor:
    clouds = torch.stack([table(6, 3, seed=1, rows=6), table(6, 3, seed=2, rows=6)])
    return torch.cat([conv(x, table(12, 3, rows=12)), conv(x.view(2, 6, -1), clouds).flatten(0, 1)])


def on_edges(conv: Any, x: Tensor) -> Tensor:
    edges = deep_gcn.to_edge_index(table(12, 3, rows=12))
    return conv(x, edge_index=edges)


def on_clouds(net: Any, x: Tensor) -> Tensor:
    return torch.cat([net(x).flatten(), net(x.view(2, 6, -1)).flatten()])


def of_boxes(head: Any, x: Tensor) -> Tensor:
    maps, boxes, labels = (
        x.view(1, 4, 15, 20),
        [torch.tensor([[4.0, 4, 40, 40], [8, 20, 60, 50]])],
        [torch.tensor([1, 0])],
    )
    masks = [torch.ones(2, 60, 80)]
    torch.manual_seed(0)
    losses = head(maps, boxes, labels, masks)
    return torch.cat([head(maps, boxes, labels, size=28).flatten(), *(loss[None] for loss in losses.values())])


def of_maps(refine: Any, x: Tensor) -> Tensor:
    coarse, maps = x[:300].view(1, 3, 10, 10), x.view(1, 4, 15, 20)
    torch.manual_seed(0)
    losses = refine(maps, coarse, torch.ones(1, 40, 40, dtype=torch.int64))
    return torch.cat([refine(maps, coarse, size=(40, 40)).flatten(), *(loss[None] for loss in losses.values())])


def of_points(head: Any, x: Tensor) -> Tensor:
    fine, coarse = x[:240].view(3, 4, 20), x[240:420].view(3, 3, 20)
    one = head(fine, coarse, labels=torch.tensor([2, 0, 1]))
    return torch.cat([head(fine, coarse).flatten(), one.flatten()])


def scores(heads: Any, x: Tensor) -> Tensor:
    return torch.stack([score for score in heads(x[:, :3], x[:, 3:7]) if score is not None])


def by_branches(norm: Any, x: Tensor) -> Tensor:
    """In training and in evaluation, the batch in parts and as a whole."""
    outputs = [norm(x)]
    with adv_prop.use_split(norm, 1):
        outputs += [norm(x), norm.eval()(x)]
    norm.train()
    return torch.cat(outputs)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Run]] = {
    "Perceptron": (lambda: deep_gcn.Perceptron(4, 6, act="prelu", **FACTORY), (12, 4), lambda m, x: m(x)),
    "EdgeConv": (lambda: deep_gcn.EdgeConv(4, 6, **FACTORY), (12, 4), on_table),
    "EdgeConv on edges": (lambda: deep_gcn.EdgeConv(4, 6, order="norm_act", **FACTORY), (12, 4), on_edges),
    "EdgeConv without norm": (lambda: deep_gcn.EdgeConv(4, 6, norm=None, **FACTORY), (12, 4), on_table),
    "EdgeConv of instances": (lambda: deep_gcn.EdgeConv(4, 6, norm="instance", **FACTORY), (12, 4), on_table),
    "MRConv": (lambda: deep_gcn.MRConv(4, 6, **FACTORY), (12, 4), on_table),
    "MRConv on edges": (lambda: deep_gcn.MRConv(4, 6, **FACTORY), (12, 4), on_edges),
    "GINConv": (lambda: deep_gcn.GINConv(4, 6, **FACTORY), (12, 4), on_table),
    "SAGEConv": (lambda: deep_gcn.SAGEConv(4, 6, **FACTORY), (12, 4), on_table),
    "SAGEConv on edges": (lambda: deep_gcn.SAGEConv(4, 6, **FACTORY), (12, 4), on_edges),
    "SAGEConv of means": (lambda: deep_gcn.SAGEConv(4, 6, reduction="mean", norm=None, **FACTORY), (12, 4), on_table),
    "SAGEConv of differences": (
        lambda: deep_gcn.SAGEConv(4, 6, reduction="mean", relative=True, **FACTORY),
        (12, 4),
        on_edges,
    ),
    "PlainGCNBlock": (lambda: deep_gcn.PlainGCNBlock(4, 6, k=3, **FACTORY), (12, 4), on_clouds),
    "ResGCNBlock": (lambda: deep_gcn.ResGCNBlock(6, k=3, **FACTORY), (12, 6), on_clouds),
    "DenseGCNBlock": (lambda: deep_gcn.DenseGCNBlock(4, growth=6, k=3, **FACTORY), (12, 4), on_clouds),
    "DeepGCN": (lambda: narrow(deep_gcn.DeepGCN(4, 3, **NET), 20), (12, 4), on_clouds),
    "DeepGCNClassifier": (
        lambda: deep_gcn.DeepGCNClassifier(4, 3, embedding_dim=8, **NET),
        (12, 4),
        lambda m, x: m(x.view(4, 3, 4)),
    ),
    "DeepGCNPartSegmenter": (lambda: deep_gcn.DeepGCNPartSegmenter(4, 3, embedding_dim=8, **NET), (12, 4), on_clouds),
    "StaticDeepGCN": (lambda: narrow(deep_gcn.StaticDeepGCN(4, 3, **NET), 13), (12, 4), on_edges),
    "PointRendHead": (lambda: point_rend.PointRendHead(4, 3, hidden_features=5, **FACTORY), (420,), of_points),
    "PointRendHead of one": (
        lambda: point_rend.PointRendHead(
            4, 3, hidden_features=5, num_fc=2, coarse_pred_each_layer=False, class_agnostic=True, **FACTORY
        ),
        (420,),
        of_points,
    ),
    "PointRendSemantic": (
        lambda: point_rend.PointRendSemantic(
            4, 3, hidden_features=5, num_points=9, subdivision_num_points=30, **FACTORY
        ),
        (1200,),
        of_maps,
    ),
    "CoarseMaskHead": (
        lambda: point_rend.CoarseMaskHead(4, 2, hidden_channels=3, hidden_features=5, **FACTORY),
        (1568,),
        lambda m, x: m(x.view(2, 4, 14, 14)),
    ),
    "BoxHead": (
        lambda: point_rend.BoxHead(4, 6, hidden_channels=3, hidden_features=5, **FACTORY),
        (1568,),
        lambda m, x: m(x.view(2, 4, 14, 14)),
    ),
    "PointRendMask": (
        lambda: point_rend.PointRendMask(
            4,
            2,
            hidden_features=5,
            coarse_hidden_channels=3,
            coarse_hidden_features=5,
            num_points=9,
            subdivision_num_points=49,
            **FACTORY,
        ),
        (1200,),
        of_boxes,
    ),
    "ImplicitPointRendMask": (
        lambda: point_rend.ImplicitPointRendMask(
            4,
            2,
            hidden_features=3,
            num_fc=1,
            parameter_hidden_channels=3,
            parameter_hidden_features=4,
            num_points=9,
            subdivision_num_points=49,
            **FACTORY,
        ),
        (1200,),
        of_boxes,
    ),
    "LIPPool2d": (lambda: LIPPool2d(4, hidden_channels=3, zero_init=None, **FACTORY), (2, 4, 6, 6), lambda m, x: m(x)),
    "LIPPool2d of a projection": (lambda: LIPPool2d(4, logit="projection", **FACTORY), (2, 4, 6, 6), lambda m, x: m(x)),
    "LIPTransition": (lambda: lip.LIPTransition(4, 6, 3, **FACTORY), (2, 4, 6, 6), lambda m, x: m(x)),
    "DenseLayer": (lambda: DenseLayer(4, 2, **FACTORY), (2, 4, 6, 6), lambda m, x: m(x)),
    "SplitBatchNorm1d": (lambda: SplitBatchNorm1d(4, **FACTORY), (12, 4), by_branches),
    "SplitBatchNorm2d": (
        lambda: SplitBatchNorm2d(4, num_splits=3, split_sizes=(2, 4, 6), **FACTORY),
        (12, 4, 2, 3),
        by_branches,
    ),
    "SplitBatchNorm3d": (lambda: SplitBatchNorm3d(4, momentum=None, **FACTORY), (12, 4, 2, 1, 2), by_branches),
    "SplitSyncBatchNorm": (lambda: adv_prop.SplitSyncBatchNorm(4, **FACTORY), (12, 4), by_branches),
    "ResidualMLP": (lambda: big_bigan.ResidualMLP(4, **PLAIN), (12, 4), lambda m, x: m(x)),
    "ProjectionScore": (
        lambda: big_bigan.ProjectionScore(4, spectral_norm=False, **FACTORY),
        (12, 4),
        lambda m, x: m(x),
    ),
    "UnaryHead": (
        lambda: big_bigan.UnaryHead(4, **PLAIN, projection_spectral_norm=False),
        (12, 4),
        lambda m, x: m(x)[1],
    ),
    "JointHead": (
        lambda: big_bigan.JointHead(3, 4, **PLAIN, projection_spectral_norm=False),
        (12, 7),
        lambda m, x: m(x[:, :3], x[:, 3:]),
    ),
    "BigBiGANHeads": (lambda: big_bigan.BigBiGANHeads(3, 4, **PLAIN, projection_spectral_norm=False), (12, 7), scores),
    "BigBiGANDiscriminator": (
        lambda: big_bigan.BigBiGANDiscriminator(
            nn.Linear(3, 3, **FACTORY), 3, 4, **PLAIN, projection_spectral_norm=False
        ),
        (12, 7),
        scores,
    ),
    "LatentHead": (
        lambda: big_bigan.LatentHead(4, 3, hidden_features=6, depth=2, **FACTORY),
        (12, 4),
        lambda m, x: torch.cat(m(x)),
    ),
}


def layers(model: nn.Module) -> dict[str, Any]:
    kinds = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds) and m.weight is not None}
    return {name: m for name, m in layers.items() if not isinstance(m, SplitBatchNorm)}  # Whose host calls it.


def made(name: str) -> nn.Module:
    return copy.deepcopy(built(name))


@functools.lru_cache
def built(name: str) -> nn.Module:
    """The module with numbers everywhere, so that no weight is zero and norms have negative factors."""
    torch.manual_seed(0)
    model = MODULES[name][0]().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / max(p[0].numel(), 1) ** 0.5)
    return model


# Each change with what it makes of weight and bias. What a change returns is undone after the call.
