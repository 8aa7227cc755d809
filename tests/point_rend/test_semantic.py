"""PointRend for semantic segmentation, and the subdivision loop."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers import point_sample, uncertain_points
from paper_layers.point_rend import PointRendSemantic, load_official
from paper_layers.point_rend._subdivision import grid_sizes, halvings, regular_grid
from paper_layers.point_rend.semantic import _segmentation_loss
from testing.official import point_rend as official
from tests.point_rend.test_heads import numbers

F64 = torch.float64
# Points are float32, whatever the maps are.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def pair(
    channels: int = 7, classes: int = 4, each: bool = False, **settings: Any
) -> tuple[PointRendSemantic, nn.Module]:
    """Return our module and the official head with the same parameters, in float64."""
    theirs = official.randomize(official.PointHead(channels, classes, 8, each)).double()
    ours = PointRendSemantic(
        channels,
        classes,
        hidden_features=8,
        coarse_pred_each_layer=each,
        **{"num_points": 40, "subdivision_num_points": 50, **settings},
        dtype=F64,
    )
    return load_official(ours, {f"point_head.{k}": v for k, v in theirs.state_dict().items()}), theirs


def inputs(n: int = 2, classes: int = 4) -> tuple[Tensor, list[Tensor]]:
    """Return coarse logits and two levels of features with 7 channels in all."""
    return numbers(n, classes, 6, 8), [numbers(n, 5, 24, 32, seed=1), numbers(n, 2, 12, 16, seed=2)]


def labels(n: int = 2, classes: int = 4) -> Tensor:
    """Return labels, a fifth of which are ignored."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(classes, (n, 48, 64), generator=generator)
    return target.where(torch.rand(target.shape, generator=generator) < 0.8, 255)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_inference_equals_official(each: bool, steps: int, classes: int) -> None:
    ours, theirs = pair(each=each, classes=classes)
    coarse, features = inputs(classes=classes)
    kept = coarse.clone()
    expected = official.semantic_inference(coarse, features, theirs, steps, 50)
    actual = ours(features, coarse, size=(6 * 2**steps, 8 * 2**steps))
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert torch.equal(coarse, kept)
    # Every memory layout has the same result.
    lasting = [x.contiguous(memory_format=torch.channels_last) for x in (coarse, *features)]
    torch.testing.assert_close(ours(lasting[1:], lasting[0], size=expected.shape[2:]), expected, **CLOSE)


def test_inference_is_differentiable() -> None:
    ours, theirs = pair()
    coarse, features = inputs()
    leaves = [x.requires_grad_() for x in (coarse, *features)]
    actual = ours(features, coarse, size=(24, 32))
    expected = official.semantic_inference(coarse, features, theirs, 2, 50)
    grad = numbers(*expected.shape, seed=5)
    grads = [torch.autograd.grad(y, leaves, grad) for y in (actual, expected)]
    torch.testing.assert_close(*grads, **CLOSE)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("each", [False, True])
def test_losses_equal_official(classes: int, each: bool) -> None:
    ours, theirs = pair(each=each, classes=classes)
    coarse, features = inputs(classes=classes)
    leaves = [x.requires_grad_() for x in (coarse, *features)]
    target = labels(classes=classes)
    losses = ours(features, coarse, target, generator=torch.Generator().manual_seed(7))
    expected = official.semantic_losses(coarse, features, theirs, target, 40, torch.Generator().manual_seed(7))
    assert list(losses) == ["loss_sem_seg", "loss_sem_seg_point"]
    torch.testing.assert_close(tuple(losses.values()), expected, **CLOSE)
    actual_grads = torch.autograd.grad(sum(losses.values()), [*leaves, *ours.parameters()])
    expected_grads = torch.autograd.grad(sum(expected), [*leaves, *theirs.parameters()])
    for a, b in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), **CLOSE)
    alone = ours.point_loss(features, coarse, target, generator=torch.Generator().manual_seed(7))
    assert torch.equal(alone, losses["loss_sem_seg_point"])


def test_one_class_is_binary() -> None:
    """The official uncertainty needs two classes, so the official code fails."""
    ours, _ = pair(classes=1)
    coarse, features = inputs(classes=1)
    target = labels(classes=2)
    losses = ours(features, coarse, target)
    full = F.interpolate(coarse, (48, 64), mode="bilinear", align_corners=False)[:, 0]
    counted = target != 255
    expected = F.binary_cross_entropy_with_logits(full[counted], target[counted].double())
    torch.testing.assert_close(losses["loss_sem_seg"], expected)
    points = torch.rand(2, 9, 2)
    some = point_sample(target[:, None].double(), points, mode="nearest")[:, 0].long()
    logits = numbers(2, 1, 9)
    expected = F.binary_cross_entropy_with_logits(logits[:, 0][some != 255], some[some != 255].double())
    torch.testing.assert_close(_segmentation_loss(logits, some, 255), expected)


@pytest.mark.parametrize(("classes", "wrong"), [(1, (2, 7, -1, 254, 2**40)), (3, (3, 7, -1, -100, 256))])
def test_labels_out_of_range(classes: int, wrong: tuple[int, ...]) -> None:
    ours, _ = pair(classes=classes)
    coarse, features = inputs(classes=classes)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for value in wrong:
        target = labels(classes=max(2, classes))
        target[-1, -1, -1] = value
        message = f"labels: expected classes from 0 to {max(2, classes) - 1} or ignore_index, 255, got {value}"
        for call in (ours, ours.point_loss, compiled)[: classes + 1]:  # Compiled once.
            with pytest.raises(ValueError, match=message):
                call(features, coarse, target)
    target = labels(classes=2)
    losses = ours(features, coarse, target.to(torch.uint8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses, ours(features, coarse, target, generator=torch.Generator().manual_seed(0)))
    assert all(loss.isfinite() for loss in ours(features, coarse, target == 1).values())


@pytest.mark.parametrize("classes", [1, 4])
def test_all_ignored_is_zero_with_a_graph(classes: int) -> None:
    """The official code returns NaN."""
    ours, _ = pair(classes=classes)
    coarse, features = inputs(classes=classes)
    leaves = [coarse.requires_grad_(), features[0].requires_grad_()]
    losses = ours(features, coarse, torch.full((2, 48, 64), 255))
    assert [loss.item() for loss in losses.values()] == [0, 0]
    grads = torch.autograd.grad(sum(losses.values()), [*leaves, *ours.parameters()])
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize(("size", "start"), [*itertools.product([(1, 1), (7, 200), (96, 128), (513, 769)], repeat=2)])
def test_halvings(size: tuple[int, int], start: tuple[int, int]) -> None:
    sizes = halvings(size, start)
    assert sizes[-1] == size
    assert all(s <= t for s, t in zip(sizes[0], start, strict=True))
    for small, large in itertools.pairwise(sizes):
        assert all(s == (t + 1) // 2 for s, t in zip(small, large, strict=True))
        assert any(t > u for t, u in zip(large, start, strict=True))
    ratio = max(s / t for s, t in zip(size, start, strict=True))
    assert len(sizes) - 1 == max(0, math.ceil(math.log2(ratio)))


@pytest.mark.parametrize("init", [1, 5, 7, 14, 16])
@pytest.mark.parametrize("num_points", [1, 100, 784, 785, 10_000])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_grids_are_official(init: int, num_points: int, steps: int) -> None:
    """The official rule, where it does not skip more maps than there are."""
    first, left = init, steps
    while 4 * first * first <= num_points and left > 0:
        first, left = 2 * first, left - 1
    sides = [first * 2**i for i in range(left + 1)]
    assert grid_sizes(init * 2**steps, init, num_points) == [(s, s) for s in sides]


def test_regular_grid_is_that_of_uncertain_points() -> None:
    every = uncertain_points(torch.zeros(2, 1, 5, 3), 15)[1]
    assert torch.equal(regular_grid(2, (5, 3), None).flatten(1, 2), every)


@pytest.mark.parametrize("size", [(48, 64), (50, 61), (6, 8), (5, 7), (1, 1), (9, 100), (200, 3)])
def test_any_size(size: tuple[int, int]) -> None:
    ours, _ = pair()
    coarse, features = inputs()
    steps = list(ours.steps(features, coarse, size))
    final = steps[-1]
    assert final.logits.shape == (2, 4, *size)
    assert torch.equal(final.logits, ours(features, coarse, size=size))
    assert steps[0].points is None
    if size == (6, 8):
        assert torch.equal(steps[0].logits, coarse)
    for before, after in itertools.pairwise(steps):
        expected = F.interpolate(before.logits, after.logits.shape[2:], mode="bilinear", align_corners=False)
        index, points = uncertain_points(expected, 50)
        assert torch.equal(after.points, points)
        values = ours.point_head(point_sample(features, points), point_sample(coarse, points))
        expected = expected.flatten(2).scatter(2, index[:, None].expand_as(values), values)
        torch.testing.assert_close(after.logits.flatten(2), expected)
        assert after.points.shape == (2, min(50, after.logits[0, 0].numel()), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(dtype: torch.dtype) -> None:
    ours, _ = pair()
    ours = ours.float()
    coarse, features = inputs()
    coarse, features = coarse.float(), [f.float() for f in features]
    expected = ours(features, coarse, size=(24, 32))
    with torch.autocast("cpu", dtype):
        # Networks pass logits in float32 and features in half precision.
        actual = ours([f.to(dtype) for f in features], coarse, size=(24, 32))
        losses = ours([f.to(dtype) for f in features], coarse, labels())
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().median() < 0.05
    grads = torch.autograd.grad(sum(losses.values()), list(ours.parameters()))
    assert all(g.isfinite().all() for g in grads)
    actual = copy.deepcopy(ours).to(dtype)([f.to(dtype) for f in features], coarse.to(dtype), size=(24, 32))
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().median() < 0.05


@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_single(n: int) -> None:
    ours, _ = pair()
    coarse, features = inputs(n)
    assert ours(features, coarse, size=(24, 32)).shape == (n, 4, 24, 32)
    losses = ours(features, coarse, labels(n))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_compile() -> None:
    ours, _ = pair()
    coarse, features = inputs()
    refine = torch.compile(lambda c, *f: ours(f, c, size=(24, 32)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(refine(coarse, *features), ours(features, coarse, size=(24, 32)))
    target = labels()

    def loss(coarse: Tensor, target: Tensor, *features: Tensor) -> Tensor:
        return sum(ours(features, coarse, target).values())

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    actual = compiled(coarse, target, *features)
    torch.manual_seed(0)
    torch.testing.assert_close(actual, loss(coarse, target, *features))


class Fixed(nn.Module):
    """Refine to one size, for export."""

    def __init__(self, refine: nn.Module):
        super().__init__()
        self.refine = refine

    def forward(self, features: list[Tensor], coarse: Tensor) -> Tensor:
        return self.refine(features, coarse, size=(24, 32))


def test_export() -> None:
    ours, _ = pair()
    coarse, features = inputs()
    batch = {0: torch.export.Dim("batch")}
    module = Fixed(ours)
    program = torch.export.export(module, (features, coarse), dynamic_shapes=([batch, batch], batch))
    coarse, features = inputs(3)
    torch.testing.assert_close(program.module()(features, coarse), module(features, coarse))


def test_copies_and_meta() -> None:
    ours, _ = pair()
    coarse, features = inputs()
    expected = ours(features, coarse, size=(24, 32))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(features, coarse, size=(24, 32)), expected)
    meta = copy.deepcopy(ours).to("meta")
    actual = meta([f.to("meta") for f in features], coarse.to("meta"), size=(24, 32))
    assert actual.shape == expected.shape
    nn.init.constant_(ours.point_head.predictor.weight, torch.nan)
    ours.reset_parameters()
    assert ours(features, coarse, size=(24, 32)).isfinite().all()
    assert "num_points=40" in repr(ours)
    assert "subdivision_num_points=50, ignore_index=255" in repr(ours)


def test_distributed(tmp_path: Any) -> None:
    """Every parameter has a gradient, also if all labels are ignored."""
    ours, _ = pair()
    coarse, features = inputs()
    twin = copy.deepcopy(ours)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(ours)
        for target in (labels(), torch.full_like(labels(), 255)):
            losses = [m(features, coarse, target, generator=torch.Generator().manual_seed(0)) for m in (parallel, twin)]
            for loss in losses:
                sum(loss.values()).backward()
            for actual, expected in zip(ours.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(actual.grad, expected.grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ignore_index", [2**31 - 1, -(2**40) - 1, -100])
def test_any_ignore_index(ignore_index: int) -> None:
    ours, _ = pair()
    coarse, features = inputs()
    losses = []
    for number in (255, ignore_index):
        ours.ignore_index, target = number, labels()
        target[target == 255] = number
        losses.append(ours(features, coarse, target, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(*losses)


def test_bad_inputs() -> None:
    ours, _ = pair()
    coarse, features = inputs()
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda: ours(features, coarse), ValueError, r"size: expected \(height, width\) where there are no labels"),
        (lambda: ours(features, coarse, size=(0, 8)), ValueError, "size: expected at least 1"),
        (lambda: ours(features, coarse, size=(1.5, 8)), TypeError, "size: expected an int or a pair of ints"),
        (lambda: ours(features, coarse[:, :3], size=(9, 9)), ValueError, r"coarse: expected shape \(N, 4, h, w\)"),
        (lambda: ours(features, coarse.long(), size=(9, 9)), TypeError, "coarse: expected one of float32"),
        (lambda: ours(features[:1], coarse, size=(9, 9)), ValueError, r"fine: expected shape \(N, 7, P\)"),
        (lambda: ours(features, coarse, labels().float()), TypeError, "labels: expected an int64 Tensor"),
        (lambda: ours(features, coarse, labels()[:1]), ValueError, r"labels: expected shape \(2, H, W\), got \(1,"),
        (lambda: PointRendSemantic(7, 4, num_points=0), ValueError, "num_points: expected at least 1, got 0"),
        (lambda: PointRendSemantic(7, 4, subdivision_num_points=0), ValueError, "subdivision_num_points: expected at"),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()
