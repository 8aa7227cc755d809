"""One class for each public function on tensors, which draws a call and its formula."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paper_layers import (
    edge_conv,
    knn,
    lip_pool2d,
    neighbor_reduce,
    point_sample,
    soft_triple_loss,
    split_batch_norm,
    uncertain_points,
)
from paper_layers.ops.soft_triple.logits import soft_triple_logits
from paper_layers.ops.spectral_linear import spectral_linear
from testing.official import soft_triple as official
from tests.ops import test_edge_conv as edges
from tests.ops import test_knn as neighbors
from tests.ops import test_lip_pool2d as lip
from tests.ops import test_neighbor_reduce as reductions
from tests.ops import test_point_sample as points
from tests.ops import test_sample_uncertain_points as candidates
from tests.ops import test_split_batch_norm as norms
from tests.ops import test_uncertain_points as uncertain

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALF = (torch.bfloat16, torch.float16)
# Kinds of values, with ordinary ones first, so most draws are ordinary.
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "offset": lambda x: x + 300,
    "spread": lambda x: x * (3 * x.flip(0)).exp(),
    "integers": lambda x: (2 * x).round(),
    "zeros": torch.zeros_like,
    "tiny": lambda x: x * 1e-6,
    "huge": lambda x: x * 1e3,
    "special": lambda x: torch.where(x > 2, torch.inf, torch.where(x < -2, torch.nan, x)),
}
ORDINARY = ("normal", "offset", "spread", "integers", "tiny", "huge")
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "expanded": lambda x: x[..., :1].expand(x.shape),
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@dataclass
class Call:
    """A function, its formula, and the arguments of both.

    Attributes:
        tensors: Arguments with gradients.
        fixed: All other arguments.
        rows: Names of the arguments whose first dimension is independent images or clouds.
        exact: Whether integer outputs equal the formula's, also for nearly equal values.
        gradients: Whether gradients match the formula; not if rounding decides which inputs get them.
        large: Whether the formula takes too long.
        in_half: Whether intermediate results are rounded to half precision.
        terms: Magnitude of terms that cancel in the outputs.
    """

    function: Callable[..., Any]
    formula: Callable[..., Any]
    tensors: dict[str, Tensor]
    fixed: dict[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    exact: bool = True
    gradients: bool = True
    large: bool = False
    in_half: bool = False
    terms: float = 0.0

    def row(self, i: int) -> Call:
        """Return the call for one image or cloud."""
        parts = [
            {name: value[i : i + 1] if name in self.rows else value for name, value in some.items()}
            for some in (self.tensors, self.fixed)
        ]
        return Call(self.function, self.formula, *parts)

    def __str__(self) -> str:
        def show(value: Any) -> str:
            if isinstance(value, Tensor):
                values = f" = {value.tolist()}" if value.numel() <= 12 else ""
                return f"{str(value.dtype)[6:]}{tuple(value.shape)}, strides {value.stride()}{values}"
            return repr(value)

        return "; ".join(f"{name}: {show(value)}" for name, value in {**self.tensors, **self.fixed}.items())


class Draw:
    """Random choices and tensors, all from one seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.pick(*DTYPES)
        self.large = self.random.random() < 0.1

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def size(self, *options: int) -> int:
        """Draw one of the usual sizes; zero is rare."""
        return self.pick(*(options or (1, 2, 3, 5, 8, 17, 33))) if self.random.random() < 0.97 else 0

    def kind(self, *kinds: str) -> str:
        return self.pick("normal", "normal", *kinds)

    def floats(self, *shape: int, kind: str = "normal", dtype: torch.dtype | None = None) -> Tensor:
        x = VALUES[kind](torch.randn(shape, generator=self.generator)).to(dtype or self.dtype)
        x = x if kind == "special" else x.nan_to_num()  # Numbers above the dtype's maximum.
        layout = self.pick(*LAYOUTS)
        return LAYOUTS[layout](x) if x.numel() else x

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)


def draw_lip_pool2d(draw: Draw) -> Call:
    kernel = draw.pick(1, 2, 3, 3, 3, 5, 7, (2, 3), (1, 4))
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = tuple(draw.pick(0, k // 2) for k in sides)
    space = [draw.pick(101, 203) if draw.large else k + draw.pick(0, 1, 4, 9, 30) for k in sides]
    n, channels = draw.size(1, 2, 3), draw.size(1, 2, 8, 16, 17, 33)
    logit = draw.floats(n, draw.pick(1, max(channels, 1)), *space, kind=draw.kind("integers", "zeros", "offset"))
    kind = draw.kind(*VALUES)
    # Weights that underflow to zero turn an infinite input into NaN.
    steep = draw.pick(1, 1, 20, 300) if draw.dtype != torch.float16 and kind != "special" else 1
    options = {"kernel_size": kernel, "stride": draw.pick(1, 2, 3, (2, 1)), "padding": padding}
    return Call(
        lip_pool2d,
        lip.formula,
        {
            "input": draw.floats(n, channels, *space, kind=kind),
            "logit": logit * steep,
        },
        {**options, "ceil_mode": draw.pick(False, True)},
        rows=("input", "logit"),
        large=draw.large,
    )


def draw_knn(draw: Draw) -> Call:
    clouds, channels = draw.pick(1, 2, 3), draw.size(1, 2, 3, 3, 9, 33)
    count = draw.pick(1000, 2000) if draw.large else draw.size(1, 2, 17, 65, 130)
    kind, metric = draw.kind("offset", "integers", "zeros", "tiny", "huge", "special"), draw.pick(*_METRICS)
    tensors = {"query": draw.floats(clouds, count, channels, kind=kind)}
    if draw.pick(False, True):
        tensors["points"] = draw.floats(clouds, draw.size(1, 17, 65, 130), channels, kind=kind)
    include_self = "points" in tensors or draw.pick(False, True)
    options: dict[str, Any] = {"k": draw.pick(1, 3, 8, 16), "dilation": draw.pick(1, 1, 2, 5), "metric": metric}
    exact = metric != "cosine" and kind in ("integers", "zeros")
    if metric == "cosine" and (kind not in ("normal", "offset") or not channels):  # Zero vectors have a special rule.
        tensors = {name: draw.floats(*x.shape[:-1], channels or 1) for name, x in tensors.items()}
    rows = tuple(tensors)
    if draw.pick(False, False, True):  # Consecutive clouds of different sizes.
        tensors = {name: x.flatten(0, 1) for name, x in tensors.items()}
        for name, x in tensors.items():
            inner = draw.integers(0, len(x) + 1, 2).sort().values.tolist()
            options["points_ptr" if name == "points" else "ptr"] = torch.tensor([0, *inner, len(x)])
        rows = ()
    options["include_self"] = include_self
    return Call(knn, neighbors.neighbours, tensors, options, rows, exact, large=draw.large, terms=metric == "cosine")


_METRICS = ("sqeuclidean", "sqeuclidean", "cosine", "inner")


def _graph(draw: Draw) -> tuple[tuple[int, ...], int, int, Tensor]:
    """Draw clouds, their rows, channels and a table of neighbours, some missing."""
    clouds = draw.pick((), (draw.pick(1, 2, 3),))
    rows, channels = draw.pick(3000, 5000) if draw.large else draw.size(), draw.size(1, 3, 8, 17, 40, 100)
    index = draw.integers(-1, rows, *clouds, rows, draw.size(1, 2, 9, 20))
    return clouds, rows, channels, draw.pick(index, index.mT.contiguous().mT)


def draw_neighbor_reduce(draw: Draw) -> Call:
    clouds, rows, channels, index = _graph(draw)
    reduction, relative = draw.pick("max", "min", "sum", "mean"), draw.pick(False, True)
    kinds = ORDINARY if relative else tuple(VALUES)  # The order of infinities does not follow from their difference.
    input = draw.floats(*clouds, rows, channels, kind=draw.kind(*kinds))
    cancels = relative and reduction in ("sum", "mean") and input.numel()
    return Call(
        neighbor_reduce,
        reductions.formula,
        {"input": input},
        {"index": index, "reduction": reduction, "relative": relative},
        rows=("input", "index") if clouds else (),
        terms=index.shape[-1] * float(input.double().abs().mean()) if cancels else 0.0,
    )


def _edge_conv(center: Tensor, neighbor: Tensor, slope: Tensor, index: Tensor, minimum_where: Any) -> Any:
    return edge_conv(center, neighbor, index, negative_slope=slope, minimum_where=minimum_where)


def draw_edge_conv(draw: Draw) -> Call:
    clouds, rows, channels, index = _graph(draw)
    kind = draw.kind(*ORDINARY, "zeros")
    wide = torch.promote_types(draw.dtype, torch.float32)
    slope = torch.tensor(draw.pick(0.0, 0.25, 1.0, -0.5), dtype=wide)
    minimum_where = draw.pick(None, draw.integers(0, 2, channels).bool())
    terms = {name: draw.floats(*clouds, rows, channels, kind=kind) for name in ("center", "neighbor")}
    return Call(
        _edge_conv,
        edges.parts,
        terms | {"slope": slope},
        {"index": index, "minimum_where": minimum_where},
        rows=("center", "neighbor", "index") if clouds else (),
        gradients=draw.dtype not in HALF or kind == "integers",
        # They cancel in the mean of up to 100,000 numbers.
        terms=4 * sum(float(x.double().abs().mean().nan_to_num()) for x in terms.values()),
    )


def _point_sample(points: Tensor, boxes: Any = None, **maps: Any) -> Tensor:
    options = {name: maps.pop(name) for name in ("mode", "padding_mode", "spatial_scale") if name in maps}
    return point_sample(list(maps.values()), points, boxes=boxes, **options)


def _sampled(points_: Any = None, **arguments: Any) -> Tensor:
    names = ("boxes", "mode", "padding_mode", "spatial_scale")
    options = {name: arguments.pop(name) for name in names if name in arguments}
    where = arguments.pop("points")
    wide = torch.promote_types(where.dtype, torch.float32)
    return points.formula(where.to(wide), *(map.to(wide) for map in arguments.values()), **options)


def draw_point_sample(draw: Draw) -> Call:
    images, count = draw.size(1, 2, 3), 3000 if draw.large else draw.size()
    levels = [f"map{i}" for i in range(draw.pick(1, 1, 2, 3))]
    maps = {
        name: draw.floats(images, draw.size(1, 3, 16, 33), draw.pick(1, 4, 9, 20), draw.pick(1, 5, 16), kind=kind)
        for name in levels
        for kind in [draw.kind(*ORDINARY)]
    }
    fixed: dict[str, Any] = {"mode": draw.pick("bilinear", "nearest"), "padding_mode": draw.pick("zeros", "border")}
    rows: tuple[str, ...] = ("points", *levels)
    if draw.pick(False, True):
        fixed |= {
            "boxes": points.boxes_for(images, draw.random.randrange(2**20)),
            "spatial_scale": draw.pick(1.0, 0.25),
        }
        images, rows = sum(map(len, fixed["boxes"])), ()
    where = torch.rand(images, count, 2, generator=draw.generator) * 1.5 - 0.25
    return Call(_point_sample, _sampled, {"points": where, **maps}, fixed, rows)


def _uncertain_points(logits: Tensor, **options: Any) -> Tensor:
    return uncertain_points(logits, **options)[0]


def _most_uncertain(logits: Tensor, **options: Any) -> Tensor:
    return uncertain.formula(logits.detach(), **options)


def draw_uncertain_points(draw: Draw) -> Call:
    images, classes = draw.size(1, 2, 3), draw.pick(1, 2, 3, 4, 19, 90)
    space = (200, 150) if draw.large else (draw.pick(1, 7, 40), draw.pick(1, 9, 64))
    fixed = {"num_points": draw.pick(0, 1, 20, 500), "labels": draw.pick(None, draw.integers(0, classes, images))}
    logits = draw.floats(images, classes, *space, kind=draw.kind(*VALUES))
    rows = ("logits",) if fixed["labels"] is None else ("logits", "labels")
    return Call(_uncertain_points, _most_uncertain, {"logits": logits}, fixed, rows)


def _chosen(logits: Tensor, labels: Tensor | None, points: Tensor, count: int) -> Tensor:
    return candidates.op(logits.detach(), labels, points, count)


def _expected_choice(logits: Tensor, labels: Tensor | None, points: Tensor, count: int) -> Tensor:
    return candidates.formula(logits.detach(), points, count, labels)


def draw_sample_uncertain_points(draw: Draw) -> Call:
    images, classes = draw.size(1, 2, 3), draw.pick(1, 2, 3, 4, 19)
    many = draw.pick(1, 30, 300)
    labels = draw.pick(None, draw.integers(0, classes, images))
    logits = draw.floats(images, classes, draw.pick(1, 4, 16), draw.pick(1, 8, 16), kind="integers")
    places = candidates.between_centres(images, many, seed=draw.random.randrange(2**20))
    rows = ("logits", "points") if labels is None else ("logits", "labels", "points")
    fixed = {"labels": labels, "points": places, "count": draw.random.randrange(many + 1)}
    return Call(_chosen, _expected_choice, {"logits": logits}, fixed, rows)


def _embeddings(draw: Draw) -> dict[str, Tensor]:
    classes, count, size = draw.pick(1, 2, 7, 30), draw.pick(1, 2, 3, 10), draw.pick(2, 8, 17, 64)
    rows = 300 if draw.large else draw.size()
    kind = draw.kind("offset", "spread", "tiny", "huge")
    return {"embeddings": draw.floats(rows, size, kind=kind), "centers": draw.floats(classes, count, size)}


def _scores(embeddings: Tensor, centers: Tensor, la: float, gamma: float) -> Tensor:
    fc = centers.flatten(0, 1).mT
    return la * official.relaxed_similarity(embeddings, fc, len(centers), gamma)


def draw_soft_triple_logits(draw: Draw) -> Call:
    fixed = {"la": draw.pick(1.0, 20.0), "gamma": draw.pick(0.01, 0.1, 1.0)}
    return Call(soft_triple_logits, _scores, _embeddings(draw), fixed)


def _loss(embeddings: Tensor, centers: Tensor, labels: Tensor, tau: float, reduction: str, **options: Any) -> Tensor:
    classes, count, _ = centers.shape
    fc = centers.flatten(0, 1).mT
    counted = labels >= 0
    losses = official.losses(embeddings, fc, labels.clamp(min=0), classes, **options).where(counted, 0)
    pull = losses.new_zeros(()) + 0 * centers.sum()
    if tau > 0 and count > 1:
        pull = tau * official.regularizer(fc, classes, official.pair_mask(classes, count))
    if reduction == "none":
        return losses + pull * counted
    number = counted.sum()
    return (
        losses.sum() + pull * (number > 0) if reduction == "sum" else (losses.sum() + pull * number) / number.clamp(1)
    )


def draw_soft_triple_loss(draw: Draw) -> Call:
    tensors = _embeddings(draw)
    rows, classes = len(tensors["embeddings"]), len(tensors["centers"])
    labels = draw.integers(0, classes, rows)
    if draw.pick(False, True):
        labels = labels.where(draw.integers(0, 4, rows) > 0, -100)
    fixed = {"la": draw.pick(1.0, 20.0, 200.0), "gamma": draw.pick(0.01, 0.1, 1.0), "margin": draw.pick(0.0, 0.01, 0.5)}
    fixed |= {"labels": labels, "tau": draw.pick(0.0, 0.2), "reduction": draw.pick("mean", "sum", "none")}
    return Call(soft_triple_loss, _loss, tensors, fixed, terms=fixed["la"])


def _split_batch_norm(running: list[Tensor], **arguments: Any) -> tuple[Tensor, ...]:
    mean, var = (value.clone() for value in running)
    return split_batch_norm(running_mean=mean, running_var=var, momentum=0.25, **arguments), mean, var


def _normalized(running: list[Tensor], **arguments: Any) -> tuple[Tensor, ...]:
    arguments = {name: value for name, value in arguments.items() if value is not None}
    parts = [part.detach() for part in arguments["input"].split(arguments["split_sizes"])]
    batch = [torch.stack(values) for values in zip(*map(norms.moments, parts), strict=True)]
    factors = torch.tensor(
        [p.numel() // p.shape[1] / (p.numel() // p.shape[1] - 1) for p in parts], dtype=batch[1].dtype
    )
    batch[1] = batch[1] * factors[:, None]
    return norms.formula(**arguments), *(0.75 * old + 0.25 * new for old, new in zip(running, batch, strict=True))


def draw_split_batch_norm(draw: Draw) -> Call:
    sizes = [draw.pick(2, 3, 5) for _ in range(draw.pick(1, 2, 3))]
    space = (66, 65) if draw.large else draw.pick((), (1,), (7,), (2, 3), (9, 5), (33, 31), (2, 3, 4))
    channels = draw.pick(1, 2, 3, 16, 17, 40)
    wide = torch.promote_types(draw.dtype, torch.float32)
    tensors = {"input": draw.floats(sum(sizes), channels, *space, kind=draw.kind("offset", "integers", "huge"))}
    if draw.pick(False, True):
        dtype = draw.pick(draw.dtype, wide)
        tensors |= {name: draw.floats(len(sizes), channels, dtype=dtype) for name in ("weight", "bias")}
    running = [torch.rand(len(sizes), channels, dtype=wide, generator=draw.generator) for _ in range(2)]
    return Call(
        _split_batch_norm, _normalized, tensors, {"split_sizes": sizes, "eps": draw.pick(1e-5, 0.1), "running": running}
    )


def _spectral_linear(input: Tensor, weight: Tensor, bias: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return spectral_linear(input, weight, bias, u=u.to(weight.dtype), v=v.to(weight.dtype))


def _divided(input: Tensor, weight: Tensor, bias: Tensor, u: Tensor, v: Tensor) -> Tensor:
    u, v = u.to(weight.dtype), v.to(weight.dtype)
    return input @ (weight / (u @ weight @ v)).mT + bias


def draw_spectral_linear(draw: Draw) -> Call:
    rows, columns = draw.pick(1, 3, 17, 64, 130), draw.pick(1, 8, 33, 100)
    u, v = (torch.nn.functional.normalize(draw.floats(n), dim=0) for n in (rows, columns))
    weight = draw.floats(rows, columns) / 10 + 2 * u.outer(v)
    batch = 300 if draw.large else draw.size(1, 5, 33)
    tensors = {"input": draw.floats(batch, columns, kind=draw.kind("offset", "tiny")), "weight": weight}
    return Call(_spectral_linear, _divided, tensors | {"bias": draw.floats(rows)}, {"u": u, "v": v}, in_half=True)


OPS: dict[str, Callable[[Draw], Call]] = {
    name.removeprefix("draw_"): value for name, value in list(globals().items()) if name.startswith("draw_")
}
