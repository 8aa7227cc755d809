"""The official dense code, written from the paper's formulas on (B, C, N, 1), for any dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def layer(
    inputs: int,
    outputs: int,
    act: str | None = "relu",
    norm: str | None = "batch",
    bias: bool = True,
    drop: float = 0.0,
) -> nn.Sequential:
    acts = {"relu": nn.ReLU, "leakyrelu": lambda: nn.LeakyReLU(0.2), "prelu": lambda: nn.PReLU(1, 0.2)}
    parts: list[nn.Module] = [nn.Conv2d(inputs, outputs, 1, bias=bias)]
    if act:
        parts.append(acts[act]())
    if norm:
        parts.append(nn.BatchNorm2d(outputs) if norm == "batch" else nn.InstanceNorm2d(outputs))
    if drop:
        parts.append(nn.Dropout2d(drop))
    return nn.Sequential(*parts)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Gather the neighbours (B, N, k) from (B, C, N, 1): (B, C, N, k)."""
    start = torch.arange(len(x), device=x.device)[:, None, None] * x.shape[2]
    rows = x[..., 0].mT.flatten(0, 1)[(index + start).flatten()]
    return rows.unflatten(0, index.shape).permute(0, 3, 1, 2).contiguous()


def ends(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features of both ends of each edge, both gathered, as in the official code."""
    own = torch.arange(x.shape[2], device=x.device)[:, None].expand(index.shape)
    return gather(x, own), gather(x, index)


Search = Callable[[Tensor, int, int], Tensor]


def neighbors(x: Tensor, k: int, dilation: int) -> Tensor:
    """Search by differences. The official code uses products, which lose neighbours far from the origin."""
    points = x[..., 0].mT
    distance = (points[:, :, None] - points[:, None]).square().sum(-1)
    return distance.sort(stable=True, dim=-1).indices[..., : k * dilation : dilation]


class Edge(nn.Module):
    def __init__(self, inputs: int, outputs: int, act: str = "relu", norm: str | None = "batch", bias: bool = True):
        super().__init__()
        self.nn = layer(2 * inputs, outputs, act, norm, bias)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        center, neighbor = ends(x, index)
        return self.nn(torch.cat([center, neighbor - center], 1)).max(-1, keepdim=True).values


class MaxRelative(Edge):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        center, neighbor = ends(x, index)
        return self.nn(torch.cat([x, (neighbor - center).max(-1, keepdim=True).values], 1))


class Isomorphism(nn.Module):
    def __init__(self, inputs: int, outputs: int, act: str = "relu", norm: str | None = "batch", bias: bool = True):
        super().__init__()
        self.nn = layer(inputs, outputs, act, norm, bias)
        self.eps = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.nn((1 + self.eps) * x + gather(x, index).sum(-1, keepdim=True))


class Sage(nn.Module):
    def __init__(self, inputs: int, outputs: int, act: str = "relu", norm: str | None = "batch", bias: bool = True):
        super().__init__()
        self.nn1 = layer(inputs, inputs, act, norm, bias)
        self.nn2 = layer(2 * inputs, outputs, act, norm, bias)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.nn2(torch.cat([x, self.nn1(gather(x, index)).max(-1, keepdim=True).values], 1))


CONVS = {"edge": Edge, "mr": MaxRelative, "gin": Isomorphism, "sage": Sage}


class Wrapped(nn.Module):
    """Nest names as the official code does."""

    def __init__(self, gconv: nn.Module):
        super().__init__()
        self.gconv = gconv

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.gconv(x, index)


class Block(nn.Module):
    def __init__(self, kind: str, conv: nn.Module, k: int, dilation: int, search: Search = neighbors):
        super().__init__()
        self.search = search
        self.body = Wrapped(conv)
        self.kind, self.k, self.dilation = kind, k, dilation

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x, self.search(x, self.k, self.dilation))
        return {"plain": lambda: y, "res": lambda: y + x, "dense": lambda: torch.cat([x, y], 1)}[self.kind]()


class Net(nn.Module):
    """The official network; form is "points" (S3DIS), "cloud" (ModelNet40) or "parts" (PartNet)."""

    def __init__(
        self, form: str, inputs: int, classes: int, channels: int, blocks: int, kind: str = "res", conv: str = "edge",
        k: int = 8, drop: float = 0.3, search: Search = neighbors,
    ):  # fmt: skip
        super().__init__()
        self.form, self.k, self.search = form, k, search
        segments = form == "points"
        self.head = Wrapped(CONVS[conv](inputs, channels, bias=segments))
        growth = channels if kind == "dense" else 0
        widths = [channels + growth * i for i in range(blocks)]
        self.backbone = nn.Sequential(
            *(
                Block(kind, CONVS[conv](widths[i], channels), k, 1 if kind == "plain" else 1 + i, search)
                for i in range(blocks - 1)
            )
        )
        fused = sum(widths)
        if segments:
            self.fusion_block = layer(fused, 1024)
            self.prediction = nn.Sequential(
                layer(fused + 1024, 512), layer(512, 256), nn.Dropout(drop), layer(256, classes, None, None)
            )
        else:
            self.fusion_block = layer(fused, 1024, "leakyrelu", bias=False)
            width = 1024 * (2 if form == "cloud" else 3)
            self.prediction = nn.Sequential(
                layer(width, 512, "leakyrelu", drop=drop),
                layer(512, 256, "leakyrelu", drop=drop),
                layer(256, classes, None, None),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, N, 1) to (B, classes, N), or (B, classes)."""
        features = [self.head(x, self.search(x[:, :3], self.k, 1))]
        for block in self.backbone:
            features.append(block(features[-1]))
        x = torch.cat(features, 1)
        fused = self.fusion_block(x)
        largest, mean = fused.amax((2, 3), keepdim=True), fused.mean((2, 3), keepdim=True)
        if self.form == "cloud":
            return self.prediction(torch.cat([largest, mean], 1))[..., 0, 0]
        if self.form == "points":
            return self.prediction(torch.cat([largest.expand_as(fused), x], 1))[..., 0]
        parts = [largest.expand_as(fused), mean.expand_as(fused), fused]
        return self.prediction(torch.cat(parts, 1))[..., 0].log_softmax(1)


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Set parameters and statistics as after training: norm weights of both signs, biases other than zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator))
                part.bias.copy_(torch.randn(part.bias.shape, generator=generator))
                part.running_mean.copy_(torch.randn(part.bias.shape, generator=generator))
                part.running_var.copy_(torch.rand(part.bias.shape, generator=generator) + 0.5)
            elif isinstance(part, nn.Conv2d) and part.bias is not None:
                part.bias.copy_(torch.randn(part.bias.shape, generator=generator))
            elif isinstance(part, Isomorphism):
                part.eps.fill_(0.3)
    return module
