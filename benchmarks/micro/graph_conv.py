"""EdgeConv, MRConv and ResGCN against the official formulas, their algebra in plain PyTorch and PyG.

python -m benchmarks.micro.graph_conv [--device cuda] [--threads 2 1] [--quick] [--only TEXT] [--json PATH]
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import trange

from benchmarks.micro.command import Options, main
from benchmarks.micro.harness import Case, Comparison, Contender, Inputs, train_alone
from paper_layers.deep_gcn import DeepGCN, EdgeConv, MRConv, to_edge_index
from testing.official import deep_gcn as formulas

CONVS = {"edge": (2, 4096, 64, 16), "mr": (2, 4096, 64, 16)}  # B, N, C, k
NETS = {"ResGCN-28": (1, 4096, 28), "ResGCN-14": (1, 4096, 14)}  # B, N, blocks
BATCH_NORM = {"training": True, "momentum": 0.1, "eps": 1e-5}


def conv_inputs(case: Case) -> Inputs:
    b, n, c, k = case.params["shape"]
    make = {"device": case.device}
    index = torch.randint(n, (b, n, k), **make)
    parameters = (torch.randn(c, 2 * c, **make) / c**0.5, torch.zeros(c, **make), torch.rand(c, **make) - 0.2)
    leaves = (torch.randn(b, n, c, **make), *parameters, torch.zeros(c, **make))
    return (case.params["conv"], index, *(t.requires_grad_() for t in leaves))


def ours(conv: str, index: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    module = _module(conv, x.shape[-1], x.device)
    names = ("nn.linear.weight", "nn.linear.bias", "nn.norm.weight", "nn.norm.bias")
    return functional_call(module, dict(zip(names, (weight, bias, gamma, beta), strict=True)), (x, index))


_modules: dict[Any, nn.Module] = {}


def _module(conv: str, channels: int, device: torch.device) -> nn.Module:
    kind = {"edge": EdgeConv, "mr": MRConv}[conv]
    return _modules.setdefault((conv, channels, device), kind(channels, channels, device=device))


def official(conv: str, index: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Concatenate each edge's features, (B, 2 C, N, k), as the official dense code does."""
    x = x.mT.contiguous()[..., None]
    center, neighbor = formulas.ends(x, index)
    relative = neighbor - center
    edges = [center, relative] if conv == "edge" else [x, relative.max(-1, keepdim=True).values]
    y = F.conv2d(torch.cat(edges, 1), weight[..., None, None], bias).relu()
    return F.batch_norm(y, None, None, gamma, beta, **BATCH_NORM).max(-1).values.mT


def algebraic(conv: str, index: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Apply the linear layer to nodes, then plain PyTorch to all edges (B N, k, C)."""
    flat = x.flatten(0, 1)
    rows = (index + torch.arange(len(x), device=x.device)[:, None, None] * x.shape[1]).flatten(0, 1)
    if conv == "mr":
        z = F.linear(torch.cat([flat, (flat[rows] - flat[:, None]).amax(1)], -1), weight, bias).relu()
        return F.batch_norm(z, None, None, gamma, beta, **BATCH_NORM).view(x.shape)
    own, difference = weight.chunk(2, 1)
    y = (F.linear(flat, own - difference, bias)[:, None] + F.linear(flat, difference)[rows]).relu()
    normal = F.batch_norm(y.flatten(0, 1), None, None, gamma, beta, **BATCH_NORM)
    return normal.view(y.shape).amax(1).view(x.shape)


def pyg(conv: str, index: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Gather and scatter edges, as PyG does."""
    from torch_geometric.utils import scatter

    flat = x.flatten(0, 1)
    source, target = to_edge_index(index)
    relative = flat[source] - flat[target]
    if conv == "mr":
        edges = torch.cat([flat, scatter(relative, target, 0, len(flat), "max")], -1)
    else:
        edges = torch.cat([flat[target], relative], -1)
    y = F.batch_norm(F.linear(edges, weight, bias).relu(), None, None, gamma, beta, **BATCH_NORM)
    return (y if conv == "mr" else scatter(y, target, 0, len(flat), "max")).view(x.shape)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _product_inputs(case: Case) -> Inputs:
    b, n, c, _ = case.params["shape"]
    leaves = (torch.randn(b * n, c, device=case.device), torch.randn(2 * c, c, device=case.device))
    return tuple(t.requires_grad_() for t in leaves)


# The products of any implementation with the linear layer on nodes.
CONV_LIMIT = Contender("limit: products of the nodes", _product, "limit", inputs=_product_inputs)
CONV_CONTENDERS = (
    Contender("paper_layers.deep_gcn", ours, "ours"),
    Contender("official formula", official, "peer"),
    Contender("its algebra in PyTorch", algebraic, "peer"),
    Contender("PyG", pyg, "peer"),
)


def _matrix_search(x: Tensor, k: int, dilation: int) -> Tensor:
    points = x.detach()[..., 0].mT
    square = points.square().sum(-1, keepdim=True)
    distance = square - 2 * points @ points.mT + square.mT
    return distance.topk(k * dilation, largest=False).indices[..., ::dilation]


def _our_net(blocks: int) -> nn.Module:
    return DeepGCN(9, 13, blocks=blocks, stochastic=False)


def _official_net(blocks: int) -> nn.Module:
    return formulas.Net("points", 9, 13, 64, blocks, k=16, search=_matrix_search)


def _net_inputs(net: nn.Module, case: Case) -> Inputs:
    b, n, _ = case.params["shape"]
    x = torch.randn(b, n, 9, device=case.device)
    return (net.to(case.device), x, *net.parameters())


def our_net_inputs(case: Case) -> Inputs:
    return _net_inputs(_our_net(case.params["shape"][2]), case)


def official_net_inputs(case: Case) -> Inputs:
    net, x, *parameters = _net_inputs(_official_net(case.params["shape"][2]), case)
    return (net, x.mT[..., None].contiguous(), *parameters)


def run_net(net: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
    return net(x)


def run_official_net(net: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
    return net(x).mT


NET_CONTENDERS = (
    Contender("paper_layers.deep_gcn.DeepGCN", run_net, "ours", inputs=our_net_inputs),
    Contender("official formulas", run_official_net, "peer", inputs=official_net_inputs),
)


def plan(options: Options) -> list[Comparison]:
    convs, nets = [], []
    for conv, shape in CONVS.items():
        moved = 4 * 4 * shape[0] * shape[1] * shape[2]
        convs += [Case({"conv": conv, "shape": shape}, conv_inputs, moved, back) for back in (False, True)]
    for name, shape in NETS.items():
        if name == "ResGCN-14" or not options.quick:
            moved = 4 * shape[0] * shape[1] * 64 * shape[2] * 8
            nets += [Case({"net": name, "shape": shape}, our_net_inputs, moved, back) for back in (False, True)]
    # Separate processes for each network.
    rest = [
        Comparison(NET_CONTENDERS, nets[start : start + 2], rounds=4, seconds=0.2) for start in range(0, len(nets), 2)
    ]
    return [Comparison(CONV_CONTENDERS, convs, CONV_LIMIT, rounds=4, seconds=0.2), *rest]


def train_deep(blocks: int, points: int, steps: int, checkpointing: bool) -> dict[str, Any]:
    net = DeepGCN(9, 13, blocks=blocks, checkpointing=checkpointing)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    x, labels = torch.randn(1, points, 9), torch.randint(13, (1, points))
    losses, begin = [], time.perf_counter()
    for _ in trange(steps, desc=f"ResGCN-{blocks}"):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x).mT, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = (time.perf_counter() - begin) / steps
    facts = {"blocks": blocks, "points": points, "checkpointing": checkpointing}
    return {**facts, "losses": losses, "seconds": seconds}


def resgcn_112(options: Options) -> dict[str, Any]:
    """Train ResGCN-112 on a large cloud, with all activations in memory and with checkpoints."""
    deep = []
    if options.device == "cpu" and not options.quick:
        for checkpointing in (False, True):
            deep.append(train_alone(train_deep, options.threads[0], 112, 4096, 3, checkpointing))
            print(deep[-1])
    return {"resgcn_112": deep}


if __name__ == "__main__":
    main("graph_conv", plan, doc=__doc__, quick="fewer rounds and no ResGCN-28 and -112", more=resgcn_112)
