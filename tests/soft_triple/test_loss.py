"""The module against the paper's formula in float64, and in torch's machinery."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers.soft_triple import SoftTripleLoss, param_groups
from testing.official import soft_triple as official

CLASSES, DIM, K = 7, 6, 3
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # Relative error of one rounding.


def make(seed: int = 0, **options: Any) -> SoftTripleLoss:
    torch.manual_seed(seed)
    return SoftTripleLoss(CLASSES, DIM, **{"centers_per_class": K, **options})


def batch(rows: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    return (2 * torch.randn(rows, DIM, generator=generator)).to(dtype), labels


def columns(loss: SoftTripleLoss) -> Tensor:
    return loss.centers.detach().double().flatten(0, 1).mT.clone().requires_grad_()


def expected(loss: SoftTripleLoss, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss and the centers' gradient."""
    fc = columns(loss)
    value = official.soft_triple_loss(x.double(), fc, labels, CLASSES, loss.la, loss.gamma, loss.tau, loss.margin)
    (grad,) = torch.autograd.grad(value, fc)
    return value.detach(), grad.mT.unflatten(0, loss.centers.shape[:2])


def test_initial_centers_are_uniform_within_one_over_the_root_of_their_number() -> None:
    torch.manual_seed(0)
    loss = SoftTripleLoss(200, 50, 5)
    bound = (200 * 5) ** -0.5
    assert loss.centers.abs().max() <= bound
    quantiles = (loss.centers.flatten() / bound).quantile(torch.linspace(0, 1, 11))
    torch.testing.assert_close(quantiles, torch.linspace(-1, 1, 11), rtol=0, atol=0.02)
    before = loss.centers.detach().clone()
    parameter = loss.centers
    loss.reset_parameters()
    assert loss.centers is parameter
    assert (loss.centers != before).float().mean() > 0.99
    torch.manual_seed(0)
    loss.reset_parameters()
    assert torch.equal(loss.centers, before)


def test_arguments_are_kept_and_shown() -> None:
    options = {"la": 3, "gamma": 0.5, "tau": 0.0, "margin": 0.3, "ignore_index": 9, "reduction": "sum", "chunk_size": 2}
    loss = SoftTripleLoss(4, 8, 2, **options)
    assert {name: getattr(loss, name) for name in options} == options
    shown = "4, 8, centers_per_class=2, la=3, gamma=0.5, tau=0.0, margin=0.3, ignore_index=9, "
    assert repr(loss) == f"SoftTripleLoss({shown}reduction='sum', chunk_size=2)"
    paper = SoftTripleLoss(4, 8)
    assert (paper.centers_per_class, paper.la, paper.gamma, paper.tau, paper.margin) == (10, 20, 0.1, 0.2, 0.01)


@pytest.mark.parametrize("count", [1, K])
@pytest.mark.parametrize("labels_dtype", [torch.int64, torch.int32])
def test_reductions(count: int, labels_dtype: torch.dtype) -> None:
    options = {"la": 5.0, "gamma": 0.3, "tau": 0.7, "margin": 0.2, "ignore_index": 1, "chunk_size": 2}
    x, labels = batch(dtype=torch.float64)
    labels[:2] = torch.tensor([1, 3])
    counted = labels != 1
    each, summed, mean = (
        make(centers_per_class=count, reduction=reduction, dtype=torch.float64, **options)
        for reduction in ("none", "sum", "mean")
    )
    losses = each(x, labels.to(labels_dtype))
    assert not losses[~counted].any()
    assert 0 < (~counted).sum() < len(x)
    fc = columns(each)
    entropies = official.losses(x[counted], fc, labels[counted], CLASSES, 5, 0.3, 0.2)
    mask = official.pair_mask(CLASSES, count)
    regularizer = 0.7 * official.regularizer(fc, CLASSES, mask) if count > 1 else 0
    torch.testing.assert_close(losses[counted], entropies + regularizer)
    torch.testing.assert_close(mean(x, labels), losses.sum() / counted.sum())
    torch.testing.assert_close(summed(x, labels), entropies.sum() + regularizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_parameters_of_every_dtype(dtype: torch.dtype) -> None:
    loss = make(dtype=dtype)
    x, labels = batch(dtype=dtype)
    value = loss(x.requires_grad_(), labels)
    want, grad = expected(loss, x.detach(), labels)
    assert value.dtype == loss.get_logits(x).dtype == torch.promote_types(dtype, torch.float32)
    # Only results are rounded to half precision.
    torch.testing.assert_close(value.double(), want, rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=0)
    value.backward()
    assert (loss.centers.dtype, loss.centers.grad.dtype, x.grad.dtype) == (dtype, dtype, dtype)
    atol = grad.abs().max().item() * (1e-5 if dtype != torch.float64 else 1e-12)
    torch.testing.assert_close(loss.centers.grad.double(), grad, rtol=HALF.get(dtype, 0), atol=atol)


@pytest.mark.parametrize("dtype", [*HALF])
def test_autocast(dtype: torch.dtype) -> None:
    """The network's layers are cast; the loss is computed in float32 from their output and its own parameters."""
    net, loss = nn.Linear(4, DIM), make()
    with torch.autocast("cpu", dtype):
        x = net(torch.randn(9, 4))
        value = loss(x, labels := batch()[1])
        logits = loss.get_logits(x)
    assert (x.dtype, value.dtype, logits.dtype) == (dtype, torch.float32, torch.float32)
    want, grad = expected(loss, x.detach(), labels)
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
    value.backward()
    assert (net.weight.grad.dtype, loss.centers.grad.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(loss.centers.grad.double(), grad, rtol=1e-4, atol=1e-5)


def test_logits_are_what_the_loss_is_made_of() -> None:
    loss = make(margin=0.0, tau=0.0, la=7.0, gamma=0.2, dtype=torch.float64)
    x, labels = batch(dtype=torch.float64)
    logits = loss.get_logits(x)
    torch.testing.assert_close(logits, 7 * official.relaxed_similarity(x, columns(loss), CLASSES, 0.2))
    torch.testing.assert_close(F.cross_entropy(logits, labels), loss(x, labels))
    (through_logits,) = torch.autograd.grad(F.cross_entropy(logits, labels), loss.centers)
    torch.testing.assert_close(through_logits, *torch.autograd.grad(loss(x, labels), loss.centers))


def test_copies_and_state() -> None:
    loss, (x, labels) = make(tau=0.5, gamma=0.3), batch()
    want = loss(x, labels)
    assert {name: value.shape for name, value in loss.state_dict().items()} == {"centers": (CLASSES, K, DIM)}
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    loaded = make(seed=5, tau=0.5, gamma=0.3)
    assert not torch.equal(loaded(x, labels), want)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (loaded, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(x, labels), want)
        assert repr(twin) == repr(loss)
        nn.init.ones_(twin.centers)
    assert torch.equal(loss(x, labels), want)
    with pytest.raises(RuntimeError, match="size mismatch"):
        loss.load_state_dict({"centers": torch.zeros(CLASSES, K + 1, DIM)})


def test_meta() -> None:
    loss, (x, labels) = make(device="meta", dtype=torch.float64), batch(dtype=torch.float64)
    assert loss.centers.is_meta
    for function, real in ((loss, make(dtype=torch.float64)), (loss.get_logits, make(dtype=torch.float64).get_logits)):
        arguments = (x, labels) if function is loss else (x,)
        result, want = function(*(t.to("meta") for t in arguments)), real(*arguments)
        assert result.is_meta
        assert (result.shape, result.dtype) == (want.shape, want.dtype)
    loss.to_empty(device="cpu")
    torch.manual_seed(0)
    loss.reset_parameters()
    assert torch.equal(loss(x, labels), make(dtype=torch.float64)(x, labels))


@pytest.mark.parametrize("count", [1, K])
def test_training_lowers_the_loss(count: int) -> None:
    torch.manual_seed(0)
    net, loss = nn.Linear(10, DIM), make(centers_per_class=count)
    inputs, labels = torch.randn(60, 10), torch.arange(60) % CLASSES
    optimizer = torch.optim.Adam(param_groups(net, loss, lr=1e-2, center_lr=1e-2), eps=0.01, weight_decay=1e-4)
    before = copy.deepcopy([net, loss]), loss(net(inputs), labels).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss(net(inputs), labels).backward()
        optimizer.step()
    trained = loss(net(inputs), labels).item()
    assert trained < 0.8 * before[1]
    # Both learn.
    assert trained < before[0][1](net(inputs), labels) < before[1]
    assert trained < loss(before[0][0](inputs), labels)


def test_compile() -> None:
    loss = make()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (9, 13):
        x, labels = batch(rows)
        x.requires_grad_()
        actual, want = compiled(x, labels), loss(x, labels)
        torch.testing.assert_close(actual, want)
        leaves = (x, loss.centers)
        torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(want, leaves))
    # Compiled code also checks labels.
    with pytest.raises(ValueError, match=f"labels: expected classes from 0 to {CLASSES - 1} .*, got {CLASSES}"):
        compiled(x, labels.clamp(max=0) + CLASSES)


def test_export() -> None:
    loss, rows = make(), torch.export.Dim("rows", min=2)
    program = torch.export.export(loss, batch(), dynamic_shapes=({0: rows}, {0: rows}))
    torch.testing.assert_close(program.module()(*batch(13)), loss(*batch(13)))


def test_func_grad_of_each_row() -> None:
    loss, (x, labels) = make(dtype=torch.float64), batch(dtype=torch.float64)

    def of_row(parameters: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        return torch.func.functional_call(loss, parameters, (row[None], label[None]))

    parameters = {"centers": loss.centers.detach()}
    grads = torch.vmap(torch.func.grad(of_row), (None, 0, 0))(parameters, x, labels)["centers"]
    torch.testing.assert_close(grads.mean(0), expected(loss, x, labels)[1])


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_count_is_zero(rows: int, reduction: str) -> None:
    net, loss = nn.Linear(5, DIM), make(reduction=reduction)
    value = loss(net(torch.randn(rows, 5)), torch.full((rows,), -100))
    assert value.shape == ((rows,) if reduction == "none" else ())
    assert not value.any()
    value.sum().backward()
    for parameter in (net.weight, net.bias, loss.centers):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_embeddings_that_are_not_finite(value: float) -> None:
    """Losses of their rows are NaN, unless ignored; the centers' gradients are NaN in any case."""
    loss, (x, labels) = make(reduction="none"), batch()
    clean = loss(x, labels)
    x[4, 1] = value
    x.requires_grad_()
    losses = loss(x, labels)
    others = torch.arange(len(x)) != 4
    assert losses[4].isnan()
    torch.testing.assert_close(losses[others], clean[others])
    labels[4] = -100
    ignored = loss(x, labels)
    torch.testing.assert_close(ignored, clean * others)
    for total in (losses.sum(), ignored.sum()):
        x_grad, center_grad = torch.autograd.grad(total, (x, loss.centers))
        assert x_grad[others].isfinite().all()
        assert x_grad[4].isnan().all()
        assert center_grad.isnan().all()


CONSTRUCTOR = {
    "no classes": ((0, DIM), {}, ValueError, "num_classes: expected at least 1, got 0"),
    "classes": ((2.0, DIM), {}, TypeError, "num_classes: expected an int, got 2.0"),
    "dim": ((CLASSES, 0), {}, ValueError, "embedding_dim: expected at least 1, got 0"),
    "no centers": ((CLASSES, DIM, 0), {}, ValueError, "centers_per_class: expected at least 1, got 0"),
    "centers": ((CLASSES, DIM, True), {}, TypeError, "centers_per_class: expected an int, got True"),
    "la": ((CLASSES, DIM), {"la": "20"}, TypeError, "la: expected a number, got '20'"),
    "gamma": ((CLASSES, DIM), {"gamma": 0}, ValueError, "gamma: expected more than 0, got 0"),
    "negative gamma": ((CLASSES, DIM), {"gamma": -0.1}, ValueError, "gamma: expected more than 0, got -0.1"),
    "gamma is NaN": ((CLASSES, DIM), {"gamma": float("nan")}, ValueError, "gamma: expected more than 0, got nan"),
    "tau": ((CLASSES, DIM), {"tau": -0.2}, ValueError, "tau: expected at least 0, got -0.2"),
    "tau is NaN": ((CLASSES, DIM), {"tau": float("nan")}, ValueError, "tau: expected at least 0, got nan"),
    "margin": ((CLASSES, DIM), {"margin": None}, TypeError, "margin: expected a number, got None"),
    "reduction": ((CLASSES, DIM), {"reduction": "max"}, ValueError, "reduction: expected one of mean, sum, none, got"),
    "chunk_size": ((CLASSES, DIM), {"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0"),
    "ignore_index": ((CLASSES, DIM), {"ignore_index": 0.5}, TypeError, "ignore_index: expected an int, got 0.5"),
}


@pytest.mark.parametrize("case", CONSTRUCTOR)
def test_bad_constructor_arguments(case: str) -> None:
    numbers, options, error, message = CONSTRUCTOR[case]
    with pytest.raises(error, match=message):
        SoftTripleLoss(*numbers, **options)


def test_bad_inputs() -> None:
    loss, (x, labels) = make(), batch()
    for change, error, message in (
        ({"labels": labels + CLASSES}, ValueError, f"labels: expected classes from 0 to {CLASSES - 1} or ignore_index"),
        ({"labels": labels.clamp(max=0) + 99}, ValueError, "ignore_index, -100, got 99"),
        ({"labels": labels.clamp(max=0) - 1}, ValueError, "ignore_index, -100, got -1"),
        ({"labels": labels.double()}, TypeError, "labels: expected an int64 Tensor, got torch.float64"),
        ({"labels": labels[:, None]}, ValueError, r"labels: expected shape \(9,\), got \(9, 1\)"),
        ({"labels": labels[1:]}, ValueError, r"labels: expected shape \(9,\), got \(8,\)"),
        ({"labels": labels.tolist()}, TypeError, "labels: expected an int64 Tensor, got list"),
        ({"embeddings": x.long()}, TypeError, "embeddings: expected one of float32, .* got torch.int64"),
        ({"embeddings": x[0]}, ValueError, r"embeddings: expected shape \(B, 6\).*, got \(6,\)"),
        ({"embeddings": x[:, 1:]}, ValueError, r"embeddings: expected shape \(B, 6\).*, got \(9, 5\)"),
        ({"embeddings": x.numpy()}, TypeError, "embeddings: expected a Tensor, got ndarray"),
    ):
        with pytest.raises(error, match=message):
            loss(**{"embeddings": x, "labels": labels, **change})


def test_centers_that_merged() -> None:
    loss = make()
    with torch.no_grad():
        loss.centers[2, 1] = 3 * loss.centers[2, 0]
    assert loss.distinct_centers(1e-3).tolist() == [3, 3, 2, 3, 3, 3, 3]
    merged, classes = loss.merge_centers(1e-3)
    assert classes.bincount().tolist() == [3, 3, 2, 3, 3, 3, 3]
    torch.testing.assert_close(merged[6], F.normalize(loss.centers[2, 0], dim=0).detach())
