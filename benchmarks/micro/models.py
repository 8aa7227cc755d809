"""Whole models of other packages, swapped and as they were: a step of inference and of training.

python -m benchmarks.micro.models [--device cuda] [--threads 2] [--quick] [--only TEXT] [--json PATH]

LIP computes something else than the layers it replaces, so the model as it was is beside it, not a peer. timm's split
batch norms and PyG's DGCNN, which needs torch-cluster, compute the same. At the end, the share of our ops in a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.micro.command import Options, main
from benchmarks.micro.harness import Case, Comparison, Contender, Inputs
from paper_layers import swap
from paper_layers.deep_gcn import DynamicEdgeConv

IMAGES = {"ResNet-50": (4, 3, 160, 160), "EfficientNet-B0": (8, 3, 128, 128)}  # N, C, H, W
CLOUDS = {"DGCNN": (32, 1024, 3)}  # B, N, C


def _timm(name: str) -> nn.Module:
    from testing import torchvision_stub  # noqa: F401 (timm imports torchvision, which may not load beside a CPU torch)

    import timm  # isort: skip

    model: nn.Module = timm.create_model(name)
    return model


class DGCNN(nn.Module):
    """PyG's example of a classifier: Wang et al., "Dynamic Graph CNN for Learning on Point Clouds", 2019."""

    def __init__(self, conv: Callable[..., nn.Module], k: int = 20, classes: int = 40):
        super().__init__()
        from torch_geometric.nn import MLP, global_max_pool

        self.pool = global_max_pool
        self.conv1 = conv(MLP([2 * 3, 64, 64, 64]), k, aggr="max")
        self.conv2 = conv(MLP([2 * 64, 128]), k, aggr="max")
        self.lin = nn.Linear(128 + 64, 1024)
        self.mlp = MLP([1024, 512, 256, classes], dropout=0.5, norm=None)

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        """Return the logits of each cloud."""
        first = self.conv1(x, batch)
        second = self.conv2(first, batch)
        logits: Tensor = self.mlp(self.pool(self.lin(torch.cat([first, second], 1)), batch))
        return logits


def _pyg() -> nn.Module:
    from torch_geometric.nn import DynamicEdgeConv as Theirs

    return DGCNN(Theirs)


def _timm_split() -> nn.Module:
    model = _timm("efficientnet_b0")
    from timm.layers import convert_splitbn_model

    converted: nn.Module = convert_splitbn_model(model)
    return converted


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": lambda: _timm("resnet50"),
    "ResNet-50, swap.pooling": lambda: swap.pooling(_timm("resnet50"), logit="simplified"),
    "ResNet-50, swap.strided_conv": lambda: swap.strided_conv(_timm("resnet50"), logit="projection"),
    "EfficientNet-B0": lambda: _timm("efficientnet_b0"),
    "EfficientNet-B0, swap.split_batch_norm": lambda: swap.split_batch_norm(_timm("efficientnet_b0")),
    "EfficientNet-B0, timm's split batch norm": _timm_split,
    "DGCNN, ours": lambda: DGCNN(DynamicEdgeConv),
    "DGCNN, PyG": _pyg,
}


def inputs(name: str, case: Case) -> Inputs:
    """Make the model, in training mode for a training step, its input, and its parameters for their gradients."""
    shape = case.params["shape"]
    x = torch.randn(shape, device=case.device)
    net = MODELS[name]().to(case.device).train(case.backward)
    if len(shape) == 4:
        return (net, (x,), *net.parameters())
    batch = torch.arange(shape[0], device=case.device).repeat_interleave(shape[1])
    return (net, (x.flatten(0, 1), batch), *net.parameters())


def run(net: nn.Module, arguments: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
    output: Tensor = net(*arguments)
    return output


def contender(name: str, role: str, compiled: bool = False) -> Contender:
    title = f"{name}, compiled" if compiled else name
    return Contender(title, run, role, compiled=compiled, inputs=functools.partial(inputs, name))


def plan(options: Options) -> list[Comparison]:
    groups = {
        "ResNet-50": [("ResNet-50, swap.pooling", "ours"), ("ResNet-50, swap.strided_conv", "other")],
        "EfficientNet-B0": [("EfficientNet-B0, swap.split_batch_norm", "ours")],
        "DGCNN": [("DGCNN, ours", "ours"), ("DGCNN, PyG", "peer")],
    }
    groups["ResNet-50"].append(("ResNet-50", "other"))
    groups["EfficientNet-B0"] += [("EfficientNet-B0", "other"), ("EfficientNet-B0, timm's split batch norm", "peer")]
    found = []
    for model, entries in groups.items():
        shape = {**IMAGES, **CLOUDS}[model]
        cases = [Case({"model": model, "shape": shape}, _no_inputs, 1 << 20, back) for back in (False, True)]
        contenders = [contender(*entry) for entry in entries]
        if not options.quick and model in IMAGES:
            contenders += [contender(name, "other", compiled=True) for name, _ in entries]
        found.append(Comparison(contenders, cases, rounds=4, seconds=0.5))
    return found


def _no_inputs(case: Case) -> Inputs:
    raise ValueError("each contender makes its own")


def shares(options: Options) -> dict[str, Any]:
    """Print and return the share of our ops in the time of a training step."""
    found = {}
    for name in MODELS:
        if "swap" not in name and "ours" not in name:
            continue
        shape = {**IMAGES, **CLOUDS}[name.split(",")[0]]
        net, arguments, *parameters = inputs(name, Case({"shape": shape}, _no_inputs, 0, True, options.device))
        for _ in range(2):
            with torch.profiler.profile() as profile:
                torch.autograd.grad(net(*arguments).sum(), parameters, allow_unused=True)
        events = profile.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        ours = sum(event.self_cpu_time_total for event in events if event.key.startswith("paper_layers::"))
        found[name] = ours / total
        print(f"  {name}: {100 * found[name]:.1f} % of a training step in our ops")
    return {"shares": found}


if __name__ == "__main__":
    main("models", plan, doc=__doc__, quick="nothing compiled, fewer rounds", more=shares)
