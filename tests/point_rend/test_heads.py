"""The point head and the coarse mask head."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from paper_layers.point_rend import CoarseMaskHead, ImplicitPointHead, PointRendHead, load_official
from testing.official import point_rend as official

LAYOUTS = ("NCP", "NPC")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(inputs: int = 6, classes: int = 4, width: int = 8, **settings: bool) -> tuple[PointRendHead, nn.Module]:
    """Return our head and the official head with the same parameters, in float64."""
    theirs = official.randomize(
        official.PointHead(inputs, classes, width, settings.get("each", True), settings.get("agnostic", False))
    ).double()
    ours = PointRendHead(
        inputs,
        classes,
        hidden_features=width,
        coarse_pred_each_layer=settings.get("each", True),
        class_agnostic=settings.get("agnostic", False),
        dtype=torch.float64,
    )
    return load_official(ours, theirs.state_dict()), theirs


def arranged(x: Tensor, layout: str) -> Tensor:
    return x if layout == "NCP" else x.mT.contiguous().mT


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_official(each: bool, agnostic: bool, layout: str) -> None:
    ours, theirs = pair(each=each, agnostic=agnostic)
    for shape in ((2, 5), (1, 1), (0, 5)):
        inputs = [arranged(numbers(shape[0], c, shape[1], seed=c), layout).requires_grad_() for c in (6, 4)]
        actual, expected = ours(*inputs), theirs(*inputs)
        torch.testing.assert_close(actual, expected)
        grad = numbers(*expected.shape)
        torch.testing.assert_close(
            torch.autograd.grad(actual, [*inputs, *ours.parameters()], grad),
            tuple(
                g.squeeze(-1) if g.dim() == 3 and i > 1 else g
                for i, g in enumerate(torch.autograd.grad(expected, [*inputs, *theirs.parameters()], grad))
            ),
        )


def test_no_points() -> None:
    head = PointRendHead(6, 4, hidden_features=8)
    empty = head(torch.randn(3, 6, 0), torch.randn(3, 4, 0))
    assert empty.shape == (3, 4, 0)
    grads = torch.autograd.grad(empty.sum(), list(head.parameters()))
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("each", [True, False])
def test_labels_choose_rows(each: bool) -> None:
    ours, theirs = pair(each=each)
    fine, coarse, labels = numbers(3, 6, 5), numbers(3, 4, 5, seed=1), torch.tensor([2, 0, 3])
    expected = official.of_class(theirs(fine, coarse), labels)
    torch.testing.assert_close(ours(fine, coarse, labels), expected)
    agnostic, theirs = pair(each=each, agnostic=True)
    torch.testing.assert_close(agnostic(fine, coarse, labels), theirs(fine, coarse))
    empty = ours(fine[:0], coarse[:0], labels[:0])
    assert empty.shape == (0, 1, 5)
    grads = torch.autograd.grad(empty.sum(), list(ours.parameters()))
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("labels", [None, torch.tensor([2, 0, 3])], ids=["all", "one"])
def test_layers_without_bias(each: bool, labels: Tensor | None) -> None:
    with_zeros = PointRendHead(6, 4, hidden_features=8, coarse_pred_each_layer=each)
    without = copy.deepcopy(with_zeros)
    for layer in (*without.layers, without.predictor):
        layer.bias = None
    inputs = torch.randn(3, 6, 5), torch.randn(3, 4, 5)
    torch.testing.assert_close(without(*inputs, labels), with_zeros(*inputs, labels))
    without.reset_parameters()


def test_shares_commute_with_sampling() -> None:
    """Products before and after sampling are equal, also at points outside the map."""
    ours, theirs = pair(inputs=9)
    maps, coarse = [numbers(2, 6, 5, 7), numbers(2, 3, 4, 4, seed=1)], numbers(2, 4, 3, 3, seed=2)
    points = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.2 - 0.1
    sampled = [official.point_sample(m, points) for m in (*maps, coarse)]
    expected = theirs(torch.cat(sampled[:2], 1), sampled[2])
    fine = sum(official.point_sample(m, points) for m in ours.fine_shares(maps))
    shares = [official.point_sample(m, points) for m in ours.coarse_shares(coarse)]
    torch.testing.assert_close(ours.finish(fine, shares), expected)
    labels = torch.tensor([1, 3])
    shares = [official.point_sample(m, points) for m in ours.coarse_shares(coarse, labels)]
    torch.testing.assert_close(ours.finish(fine, shares, labels), official.of_class(expected, labels))


def test_published_sizes() -> None:
    """Parameters and multiply-adds of the heads for COCO, Cityscapes and semantic segmentation."""

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(PointRendHead(256, 80, device="meta")) == 285_776
    assert count(PointRendHead(256, 19, coarse_pred_each_layer=False, device="meta")) == 207_123
    assert count(CoarseMaskHead(256, 80, device="meta")) == 18_176_080
    assert PointRendHead(256, 80, device="meta").layers[1].weight.shape == (256, 336)
    assert PointRendHead(256, 8, device="meta").layers[1].weight.shape == (256, 264)
    assert multiply_adds(points=1) == 284_928
    assert round(multiply_adds(points=224**2) / 1e9, 2) == 14.30
    assert round(multiply_adds(points=28**2 + 3 * 28**2) / 1e9, 4) == 0.8935


def multiply_adds(points: int) -> int:
    head = PointRendHead(256, 80, device="meta")
    with FlopCounterMode(display=False) as counter:
        head(torch.empty(1, 256, points, device="meta"), torch.empty(1, 80, points, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("inputs", [6, 8])
def test_coarse_equals_official(inputs: int) -> None:
    theirs = official.randomize(official.CoarseHead(inputs, 4, 6, 10)).double()
    ours = load_official(
        CoarseMaskHead(inputs, 4, hidden_channels=6, hidden_features=10, dtype=torch.float64), theirs.state_dict()
    )
    assert (ours.reduce_channels is None) == (inputs == 6)
    x = numbers(3, inputs, 14, 14).requires_grad_()
    torch.testing.assert_close(ours(x), theirs(x))
    grads = [torch.autograd.grad(m(x).square().sum(), [x, *m.parameters()]) for m in (ours, theirs)]
    torch.testing.assert_close(*grads)
    assert ours(x[:0]).shape == (0, 4, 7, 7)
    assert CoarseMaskHead(3, 4, hidden_channels=6, hidden_features=10)(torch.randn(1, 3, 14, 14)).shape == (
        1,
        4,
        7,
        7,
    )  # narrower than hidden_channels


def test_start() -> None:
    head = PointRendHead(256, 80)
    for layer in head.layers:
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)
        assert not layer.bias.any()
    assert head.predictor.weight.std().item() == pytest.approx(0.001, rel=0.05)
    coarse = CoarseMaskHead(300, 8)
    for conv in (coarse.reduce_channels, coarse.reduce_size):
        fan_out = conv.weight[:, 0].numel()
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
    for linear in (coarse.fc1, coarse.fc2):
        bound = math.sqrt(3 / linear.in_features)
        assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert coarse.prediction.weight.std().item() == pytest.approx(0.001, rel=0.05)
    for module in (PointRendHead(4, 2, hidden_features=8), CoarseMaskHead(8, 2, hidden_channels=4, hidden_features=8)):
        for parameter in module.parameters():
            nn.init.constant_(parameter, torch.nan)
        module.reset_parameters()
        assert all(p.isfinite().all() for p in module.parameters())


def test_copies_and_half_types() -> None:
    head, coarse = PointRendHead(6, 4, hidden_features=8), CoarseMaskHead(6, 4, hidden_channels=4, hidden_features=8)
    official.randomize(head), official.randomize(coarse)
    fine, logits, features = torch.randn(2, 6, 5), torch.randn(2, 4, 5), torch.randn(2, 6, 14, 14)
    for module, inputs in ((head, (fine, logits)), (coarse, (features,))):
        expected = module(*inputs)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(*inputs), expected)
        for dtype in (torch.bfloat16, torch.float16):
            half = copy.deepcopy(module).to(dtype)(*(x.to(dtype) for x in inputs))
            assert half.dtype == dtype
            torch.testing.assert_close(half.float(), expected, atol=0.3, rtol=0.05)
            with torch.autocast("cpu", dtype):
                auto = module(*inputs)
            assert auto.dtype == dtype
            torch.testing.assert_close(auto.float(), expected, atol=0.3, rtol=0.05)
            grads = torch.autograd.grad(auto.float().sum(), list(module.parameters()))
            assert all(g.isfinite().all() for g in grads)


def test_mixed_dtypes_under_autocast() -> None:
    """Autocast passes fine features in half precision and coarse logits in float32."""
    head = official.randomize(PointRendHead(6, 4, hidden_features=8))
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(2, 6, 5).bfloat16(), torch.randn(2, 4, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize("labels", [None, torch.tensor([1, 0])])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_and_export(labels: Tensor | None, layout: str) -> None:
    head = official.randomize(PointRendHead(6, 4, hidden_features=8))
    inputs = [arranged(torch.randn(2, c, 5), layout) for c in (6, 4)]
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    actual, expected = compiled(*inputs, labels), head(*inputs, labels)
    torch.testing.assert_close(actual, expected)
    if labels is None:  # The stride of a dimension of size 1 is arbitrary.
        assert actual.stride() == expected.stride()
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), list(head.parameters())),
        torch.autograd.grad(expected.sum(), list(head.parameters())),
    )
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("points")}
    shapes = (sizes, sizes, None if labels is None else {0: sizes[0]})
    program = torch.export.export(head, (*inputs, labels), dynamic_shapes=shapes)
    others = [arranged(torch.randn(3, c, 7), layout) for c in (6, 4)]
    labels = None if labels is None else torch.tensor([1, 0, 3])
    torch.testing.assert_close(program.module()(*others, labels), head(*others, labels))


def test_onnx() -> None:
    from onnx.reference import ReferenceEvaluator

    head = official.randomize(PointRendHead(6, 4, hidden_features=8, coarse_pred_each_layer=False)).eval()
    inputs = (torch.randn(2, 6, 5), torch.randn(2, 4, 5))
    program = torch.onnx.export(head, inputs, dynamo=True, verbose=False)
    assert program is not None
    evaluator = ReferenceEvaluator(program.model_proto)
    feed = dict(zip(evaluator.input_names, (x.numpy() for x in inputs), strict=True))
    torch.testing.assert_close(torch.from_numpy(evaluator.run(None, feed)[0]), head(*inputs).detach())


def test_func_and_second_derivatives() -> None:
    head, _ = pair()
    fine, coarse = numbers(2, 6, 3).requires_grad_(), numbers(2, 4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(head, (fine, coarse))
    assert torch.autograd.gradgradcheck(lambda *x: head(*x).square(), (fine, coarse))
    many = numbers(4, 2, 6, 3), numbers(4, 2, 4, 3, seed=1)
    torch.testing.assert_close(torch.vmap(head)(*many), torch.stack([head(*one) for one in zip(*many, strict=True)]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    labels, x, c = torch.tensor([3, 1]), torch.randn(2, 6, 5), torch.randn(2, 4, 5)
    head = PointRendHead(6, 4, hidden_features=8)
    assert torch.equal(head(x, c, labels.to(dtype)), head(x, c, labels))
    implicit = ImplicitPointHead(6, 4, hidden_features=8)
    arguments = (x, torch.randn(2, implicit.num_params), torch.rand(2, 5, 2))
    assert torch.equal(implicit(*arguments, labels.to(dtype)), implicit(*arguments, labels))


def test_bad_inputs() -> None:
    head, coarse = PointRendHead(6, 4, hidden_features=8), CoarseMaskHead(6, 4, hidden_channels=4, hidden_features=8)
    x, c = torch.randn(2, 6, 5), torch.randn(2, 4, 5)
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda: head(x[0], c), ValueError, r"fine: expected shape \(N, 6, P\), got \(6, 5\)"),
        (lambda: head(x[:, :5], c), ValueError, r"fine: expected shape \(N, 6, P\), got \(2, 5, 5\)"),
        (lambda: head(x, c[:, :, :4]), ValueError, r"coarse: expected shape \(2, 4, 5\), got \(2, 4, 4\)"),
        (lambda: head(x, c, torch.tensor([1])), ValueError, r"labels: expected shape \(2,\), got \(1,\)"),
        (lambda: head(x, c, torch.tensor([1.0, 2])), TypeError, "labels: expected an int64 Tensor, got torch.float32"),
        (lambda: head(x, c, torch.tensor([0, 4])), IndexError, "index out of range"),
        (lambda: head(x, c, torch.tensor([0, -1])), IndexError, "index out of range"),
        (lambda: PointRendHead(0, 4), ValueError, "in_channels: expected at least 1, got 0"),
        (lambda: PointRendHead(6, 4, num_fc=0), ValueError, "num_fc: expected at least 1, got 0"),
        (lambda: PointRendHead(6, 4.0), TypeError, "num_classes: expected an int, got 4.0"),
        (lambda: coarse(torch.randn(1, 6, 7, 7)), ValueError, r"features: expected shape \(R, 6, 14, 14\), got"),
        (lambda: CoarseMaskHead(6, 4, hidden_channels=-1), ValueError, "hidden_channels: expected at least 1, got -1"),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()


def test_repr() -> None:
    assert "6, 4, hidden_features=8, num_fc=3, coarse_pred_each_layer=True, class_agnostic=False" in repr(
        PointRendHead(6, 4, hidden_features=8)
    )
    assert repr(CoarseMaskHead(6, 4, hidden_channels=4, hidden_features=8)).startswith("CoarseMaskHead(\n  6, 4\n")
