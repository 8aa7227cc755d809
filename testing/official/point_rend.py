"""The official procedure, written from the paper and its formulas in plain PyTorch, for any dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def point_sample(input: Tensor, points: Tensor, mode: str = "bilinear") -> Tensor:
    """(N, C, H, W) at (N, P, 2) in [0, 1], zeros outside: (N, C, P)."""
    grid = 2 * points[:, :, None].to(input.dtype) - 1
    return F.grid_sample(input, grid, mode=mode, align_corners=False)[..., 0]


def box_sample(features: Tensor, boxes: Sequence[Tensor], points: Tensor, scale: float) -> Tensor:
    """Features at points relative to the boxes, image by image: (R, C, P)."""
    size = torch.tensor([features.shape[3], features.shape[2]], device=features.device) / scale
    parts = []
    for image, (box, some) in enumerate(zip(boxes, points.split([len(b) for b in boxes]), strict=True)):
        absolute = box[:, None, :2] + some.to(box.dtype) * (box[:, None, 2:] - box[:, None, :2])
        flat = (absolute / size.to(box.dtype)).flatten(0, 1)[None]
        sampled = point_sample(features[image : image + 1], flat)[0]
        parts.append(sampled.unflatten(1, some.shape[:2]).transpose(0, 1))
    return torch.cat(parts)


def regular_points(rows: int, side: int, device: torch.device | None = None) -> Tensor:
    center = (torch.arange(side, device=device) + 0.5) / side
    y, x = torch.meshgrid(center, center, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1).expand(rows, -1, -1)


def uncertainty(logits: Tensor) -> Tensor:
    """(N, C, ...) to (N, ...): second best minus best; of one logit -|l|."""
    if logits.shape[1] == 1:
        return -logits[:, 0].abs()
    best = logits.topk(2, 1).values
    return best[:, 1] - best[:, 0]


def of_class(logits: Tensor, labels: Tensor) -> Tensor:
    """(R, K, ...) to (R, 1, ...)."""
    return logits[torch.arange(len(logits)), labels][:, None]


def training_points(logits: Tensor, count: int, generator: torch.Generator, k: float = 3, beta: float = 0.75) -> Tensor:
    candidates = torch.rand(len(logits), int(k * count), 2, generator=generator)
    chosen = uncertainty(point_sample(logits, candidates)).topk(int(beta * count), 1).indices
    kept = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    return torch.cat([kept, torch.rand(len(logits), count - int(beta * count), 2, generator=generator)], 1)


def grid_points(uncertain: Tensor, count: int) -> tuple[Tensor, Tensor]:
    height, width = uncertain.shape[1:]
    index = uncertain.flatten(1).topk(min(count, height * width), 1).indices
    return index, torch.stack([(index % width + 0.5) / width, (index // width + 0.5) / height], -1)


class PointHead(nn.Module):
    """Under the official names."""

    def __init__(self, inputs: int, classes: int, width: int = 256, each: bool = True, agnostic: bool = False):
        super().__init__()
        self.each = each
        extra = classes if each else 0
        self.fc1 = nn.Conv1d(inputs + classes, width, 1)
        self.fc2 = nn.Conv1d(width + extra, width, 1)
        self.fc3 = nn.Conv1d(width + extra, width, 1)
        self.predictor = nn.Conv1d(width + extra, 1 if agnostic else classes, 1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        x = torch.cat([fine, coarse], 1)
        for layer in (self.fc1, self.fc2, self.fc3):
            x = F.relu(layer(x))
            if self.each:
                x = torch.cat([x, coarse], 1)
        return self.predictor(x)


class CoarseHead(nn.Module):
    """Under the official names."""

    def __init__(self, inputs: int, classes: int, conv: int = 256, width: int = 1024):
        super().__init__()
        if inputs > conv:
            self.reduce_channel_dim_conv = nn.Conv2d(inputs, conv, 1)
        self.reduce_spatial_dim_conv = nn.Conv2d(conv, conv, 2, 2)
        self.fc1, self.fc2 = nn.Linear(conv * 49, width), nn.Linear(width, width)
        self.prediction = nn.Linear(width, classes * 49)

    def flat(self, x: Tensor) -> Tensor:
        if hasattr(self, "reduce_channel_dim_conv"):
            x = F.relu(self.reduce_channel_dim_conv(x))
        x = F.relu(self.reduce_spatial_dim_conv(x)).flatten(1)
        return self.prediction(F.relu(self.fc2(F.relu(self.fc1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(x).view(len(x), -1, 7, 7)


class ParameterHead(CoarseHead):
    """The coarse head's layers with a flat prediction."""

    def __init__(self, inputs: int, outputs: int, conv: int = 256, width: int = 1024):
        super().__init__(inputs, 1, conv, width)
        self.prediction = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(x)


class ImplicitHead(nn.Module):
    """Under the official name of its buffer; the parameters are all weights, layer by layer, then all biases."""

    def __init__(self, inputs: int, outputs: int, width: int = 256, layers: int = 3):
        super().__init__()
        self.widths = [256 + inputs, *[width] * layers, outputs]
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, 128))

    def forward(self, parameters: Tensor, fine: Tensor, points: Tensor) -> Tensor:
        t = 2 * math.pi * ((2 * points - 1).to(fine.dtype) @ self.positional_encoding_gaussian_matrix)
        x = torch.cat([torch.cat([t.sin(), t.cos()], -1).transpose(1, 2), fine], 1)
        start, weights = 0, []
        for c, d in zip(self.widths[:-1], self.widths[1:], strict=True):
            weights.append(parameters[:, start : start + d * c].reshape(-1, d, c))
            start += d * c
        for number, weight in enumerate(weights):
            x = torch.einsum("nck,ndc->ndk", x, weight) + parameters[:, start : start + weight.shape[1], None]
            start += weight.shape[1]
            x = x if number == len(weights) - 1 else F.relu(x)
        assert start == parameters.shape[1]
        return x


def semantic_inference(coarse: Tensor, features: Sequence[Tensor], head: nn.Module, steps: int, count: int) -> Tensor:
    logits = coarse
    for _ in range(steps):
        logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
        index, points = grid_points(uncertainty(logits), count)
        fine = torch.cat([point_sample(f, points) for f in features], 1)
        values = head(fine, point_sample(coarse, points))
        shape = logits.shape
        index = index[:, None].expand(-1, shape[1], -1)
        logits = logits.flatten(2).scatter(2, index, values).view(shape)
    return logits


def semantic_losses(
    coarse: Tensor, features: Sequence[Tensor], head: nn.Module, target: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    full = F.interpolate(coarse, target.shape[1:], mode="bilinear", align_corners=False)
    points = training_points(coarse, count, generator)
    fine = torch.cat([point_sample(f, points) for f in features], 1)
    labels = point_sample(target[:, None].to(coarse.dtype), points, "nearest")[:, 0].long()
    logits = head(fine, point_sample(coarse, points))
    return F.cross_entropy(full, target, ignore_index=255), F.cross_entropy(logits, labels, ignore_index=255)


def mask_points(
    coarse: Tensor, features: Tensor, boxes: Sequence[Tensor], head: nn.Module, points: Tensor, scale: float
) -> Tensor:
    return head(box_sample(features, boxes, points, scale), point_sample(coarse, points))


def implicit_points(
    parameters: Tensor, features: Tensor, boxes: Sequence[Tensor], head: nn.Module, points: Tensor, scale: float
) -> Tensor:
    return head(parameters, box_sample(features, boxes, points, scale), points)


def mask_inference(
    coarse: Tensor, features: Tensor, boxes: Sequence[Tensor], labels: Tensor, head: nn.Module,
    steps: int = 5, init: int = 7, count: int = 28 * 28, scale: float = 0.25,
    mask_points: Callable[..., Tensor] = mask_points,
) -> Tensor:  # fmt: skip
    """(R, K, S, S), all classes, as the official code keeps them."""
    while 4 * init * init <= count:
        init, steps = 2 * init, steps - 1
    points = regular_points(len(coarse), init, coarse.device)
    logits = mask_points(coarse, features, boxes, head, points, scale).unflatten(2, (init, init))
    for _ in range(steps):
        logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
        own = logits if logits.shape[1] == 1 else of_class(logits, labels)
        index, points = grid_points(uncertainty(own), count)
        values = mask_points(coarse, features, boxes, head, points, scale)
        shape = logits.shape
        index = index[:, None].expand(-1, shape[1], -1)
        logits = logits.flatten(2).scatter(2, index, values).view(shape)
    return logits


def mask_point_loss(
    coarse: Tensor, features: Tensor, boxes: Sequence[Tensor], labels: Tensor, masks: Sequence[Tensor],
    head: nn.Module, count: int, generator: torch.Generator, scale: float = 0.25,
) -> Tensor:  # fmt: skip
    """Masks (R_i, H, W), one for each box."""
    points = training_points(of_class(coarse, labels), count, generator)
    logits = mask_points(coarse, features, boxes, head, points, scale)
    own = (logits if logits.shape[1] == 1 else of_class(logits, labels))[:, 0]
    return F.binary_cross_entropy_with_logits(own, true_masks(boxes, masks, points))


def true_masks(boxes: Sequence[Tensor], masks: Sequence[Tensor], points: Tensor) -> Tensor:
    true = []
    for box, mask, some in zip(boxes, masks, points.split([len(b) for b in boxes]), strict=True):
        absolute = box[:, None, :2] + some.to(box.dtype) * (box[:, None, 2:] - box[:, None, :2])
        size = torch.tensor([mask.shape[2], mask.shape[1]], dtype=box.dtype)
        true.append(point_sample(mask[:, None], absolute / size)[:, 0])
    return torch.cat(true)


def implicit_losses(
    parameters: Tensor, features: Tensor, boxes: Sequence[Tensor], labels: Tensor, masks: Sequence[Tensor],
    head: nn.Module, count: int, generator: torch.Generator, scale: float = 0.25,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """That of uniform points, and that of the parameters."""
    points = torch.rand(len(parameters), count, 2, generator=generator)
    logits = implicit_points(parameters, features, boxes, head, points, scale)
    own = (logits if logits.shape[1] == 1 else of_class(logits, labels))[:, 0]
    loss = F.binary_cross_entropy_with_logits(own, true_masks(boxes, masks, points))
    return loss, 1e-5 * (parameters**2).mean()


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters large enough that no logit is near another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(1, parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan) ** 0.5)
    return module
