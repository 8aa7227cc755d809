"""The SoftTriple loss against the official formula, its block-wise form in PyTorch and pytorch-metric-learning.

python -m benchmarks.micro.soft_triple [--device cuda] [--threads 2 1] [--quick] [--only TEXT] [--json PATH]

The limit is the time of our matrix products alone: in chunks of classes, with the scores recomputed in the backward.
At the end, a million classes are trained for some steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from benchmarks.micro.command import Options, Target, main
from benchmarks.micro.harness import Case, Comparison, Contender, Inputs, Result, train_alone
from paper_layers import SoftTripleLoss, soft_triple_loss
from paper_layers.soft_triple import param_groups
from testing.official import soft_triple as formulas

SHAPES = ((32, 64, 98, 10), (128, 512, 100, 10), (256, 512, 11318, 2), (256, 512, 11318, 10), (64, 256, 100000, 4))
QUICK = SHAPES[:2]
LARGE = 1 << 23  # Cases with at least as many elements of centers take seconds.
MILLION = {"classes": 1_000_000, "centers_per_class": 2, "dim": 128, "batch": 256}
GRAM_LIMIT = 8e9  # Largest matrix of all centers' products, in bytes; peers hold several.
CHUNK = 1 << 20  # Number of scores at a time in the limit.


def _sizes(case: Case) -> tuple[int, ...]:
    return tuple(case.params["B, d, C, K"])


def inputs(case: Case) -> Inputs:
    """Make embeddings, centers, labels, tau."""
    b, d, c, k = _sizes(case)
    make = {"device": case.device}
    x, labels = torch.randn(b, d, **make).requires_grad_(), torch.randint(c, (b,), **make)
    return x, torch.randn(c, k, d, **make).requires_grad_(), labels, case.params["tau"]


def _check_memory(case: Case) -> None:
    _, _, c, k = _sizes(case)
    size = 4 * (c * k) ** 2
    if case.params["tau"] > 0 and size > GRAM_LIMIT:
        raise MemoryError(f"the products of all centers would take {size / 1e9:.0f} GB")


def ours(x: Tensor, centers: Tensor, labels: Tensor, tau: float) -> Tensor:
    return soft_triple_loss(x, centers, labels, tau=tau)


def official_inputs(case: Case) -> Inputs:
    """Make centers as columns, and a mask of the pairs in one class."""
    _check_memory(case)
    x, centers, labels, tau = inputs(case)
    fc = centers.detach().flatten(0, 1).mT.contiguous().requires_grad_()
    c, k, _ = centers.shape
    return x, fc, labels, tau, c, formulas.pair_mask(c, k, x.device) if tau else None


def official(x: Tensor, fc: Tensor, labels: Tensor, tau: float, classes: int, mask: Tensor | None) -> Tensor:
    return formulas.soft_triple_loss(x, fc, labels, classes, tau=tau, mask=mask)


def block_wise_inputs(case: Case) -> Inputs:
    x, centers, labels, tau = inputs(case)
    k = centers.shape[1]
    return x, centers, labels, tau, torch.triu_indices(k, k, 1, device=x.device)


def block_wise(x: Tensor, centers: Tensor, labels: Tensor, tau: float, pairs: Tensor) -> Tensor:
    """Compute the official formula, with products only of centers of the same class."""
    c, k, _ = centers.shape
    unit = F.normalize(centers, dim=2)
    similarity = (F.normalize(x, dim=1) @ unit.flatten(0, 1).mT).unflatten(1, (c, k))
    relaxed = ((similarity / 0.1).softmax(2) * similarity).sum(2)
    loss = F.cross_entropy(20 * (relaxed - 0.01 * F.one_hot(labels, c)), labels)
    distance = (2 + 1e-5 - 2 * (unit @ unit.mT)[:, pairs[0], pairs[1]]).sqrt()
    return loss + tau * distance.sum() / (c * k * (k - 1))


def metric_learning_inputs(case: Case) -> Inputs:
    from pytorch_metric_learning.losses import SoftTripleLoss as TheirLoss
    from pytorch_metric_learning.regularizers import SparseCentersRegularizer

    _check_memory(case)
    x, centers, labels, tau = inputs(case)
    c, k, d = centers.shape
    options = {"weight_regularizer": SparseCentersRegularizer(c, k), "weight_reg_weight": tau} if tau else {}
    loss = TheirLoss(c, d, k, **options)
    loss.fc = nn.Parameter(centers.detach().flatten(0, 1).mT.contiguous())
    return loss, x, labels, loss.fc


def metric_learning(loss: nn.Module, x: Tensor, labels: Tensor, fc: Tensor) -> Tensor:
    return loss(x, labels)


def _product_inputs(case: Case) -> Inputs:
    b, d, c, k = _sizes(case)
    make = {"device": case.device}
    return torch.randn(b, d, **make), torch.randn(c * k, d, **make), torch.empty(c * k, d, **make)


def own_products(x: Tensor, centers: Tensor, grad: Tensor) -> Tensor:
    """Compute scores, then scores again and both gradients' products."""
    size = max(1, CHUNK // len(x))
    scores = x.new_empty(min(size, len(centers)), len(x))
    for part in centers.split(size):
        torch.mm(part, x.mT, out=scores[: len(part)])
    grad_x = torch.zeros_like(x)
    for part, out in zip(centers.split(size), grad.split(size), strict=True):
        torch.mm(part, x.mT, out=scores[: len(part)])
        grad_x.addmm_(scores[: len(part)].mT, part)
        torch.mm(scores[: len(part)], x, out=out)
    return grad_x[0]


def bare_products(x: Tensor, centers: Tensor, grad: Tensor) -> Tensor:
    """Compute scores and both gradients' products, each at once."""
    scores = x @ centers.mT
    torch.mm(scores.mT, x, out=grad)
    return (scores @ centers)[0]


LIMIT = Contender("limit: its own products", own_products, "limit", inputs=_product_inputs)
BARE = Contender("three products at once", bare_products, "other", inputs=_product_inputs)
OURS = Contender("paper_layers.soft_triple_loss", ours, "ours")
OFFICIAL = Contender("official formula", official, "peer", inputs=official_inputs)
BLOCK_WISE = Contender("block-wise formula in PyTorch", block_wise, "peer", inputs=block_wise_inputs)
METRIC_LEARNING = Contender("pytorch-metric-learning", metric_learning, "peer", inputs=metric_learning_inputs)
# With glibc's defaults, which don't keep the heap.
OURS_AT_DEFAULTS, BLOCK_WISE_AT_DEFAULTS = (
    replace(contender, name=f"{contender.name}, malloc's defaults", role="other", keeps_heap=False)
    for contender in (OURS, BLOCK_WISE)
)


def plan(options: Options) -> Iterator[Comparison]:
    """Plan forward + backward, with separate processes for each case to limit their memory."""
    for shape in QUICK if options.quick else SHAPES:
        _, d, c, k = shape
        large = c * k * d >= LARGE
        for tau in (0.0, 0.2):
            # Large cases touch enough memory on their first run, and all processes must fit into memory.
            case = Case({"B, d, C, K": shape, "tau": tau}, inputs, 0 if large else 4 * c * k * d, True)
            contenders = [OURS, OFFICIAL, *([BLOCK_WISE] if tau else []), METRIC_LEARNING]
            rounds, seconds = 5, 0.3
            if large:
                # With all centers' products, a single run takes up to half a minute.
                rounds, seconds = 1 if tau and 4 * (c * k) ** 2 < GRAM_LIMIT else 3, 0.5
                contenders += [OURS_AT_DEFAULTS, BLOCK_WISE_AT_DEFAULTS] if tau else []
            yield Comparison([*contenders, BARE], [case], LIMIT, rounds, seconds)


def targets(results: Sequence[Result], device: str) -> Iterator[Target]:
    """Set targets for the large cases."""
    for case in dict.fromkeys(r.case for r in results):
        found = {r.contender: r for r in results if r.case == case and not r.error}
        shape, tau = next(r.params.values() for r in results if r.case == case)
        mine = found.get(OURS.name)
        if shape not in SHAPES[2:] or mine is None:
            continue
        name = f"{shape}, tau {tau:g}"
        yield Target(f"{name}: times its own products", 1.5, [mine.to_limit], at_most=True)
        peers = [r for r in found.values() if r.role == "peer"]
        gradients = 4 * math.prod(shape[1:]) + 4 * shape[0] * shape[1]  # Included in each peak.
        for index, ratio in ((3, 2.0 if tau == 0 else 3.0), (4, 3.0)):
            if shape == SHAPES[index]:
                fastest = min((r.to_ours for r in peers), default=math.nan)
                yield Target(f"{name}: times as fast as the best peer", ratio, [fastest])
        if OURS_AT_DEFAULTS.name in found and BLOCK_WISE_AT_DEFAULTS.name in found:
            ratio = found[BLOCK_WISE_AT_DEFAULTS.name].median / found[OURS_AT_DEFAULTS.name].median
            yield Target(f"{name}, malloc's defaults: times as fast as block-wise", 3.0, [ratio])
        if shape == SHAPES[3] and tau == 0:
            least = min((r.peak - gradients for r in peers), default=math.nan)
            part = [(mine.peak - gradients) / least]
            yield Target(f"{name}: memory beyond gradients, as part of the best peer's", 0.125, part, at_most=True)
        if shape == SHAPES[4]:
            memory = [(mine.peak - gradients) / 2**30]
            yield Target(f"{name}: GiB beyond parameters and gradients", 1.0, memory, at_most=True)


def train(classes: int, centers_per_class: int, dim: int, batch: int, steps: int) -> dict[str, Any]:
    """Train some steps on random inputs."""
    net, loss = nn.Linear(dim, dim), SoftTripleLoss(classes, dim, centers_per_class)
    optimizer = torch.optim.Adam(param_groups(net, loss), eps=0.01, weight_decay=1e-4)
    x, labels = torch.randn(batch, dim), torch.randint(classes, (batch,))
    losses, seconds = [], []
    for _ in trange(steps, desc=f"{classes} classes"):
        begin = time.perf_counter()
        optimizer.zero_grad()
        value = loss(net(x), labels)
        value.backward()
        middle = time.perf_counter()
        optimizer.step()
        seconds.append((middle - begin, time.perf_counter() - middle))
        losses.append(value.item())
    forward_backward, step = (sorted(column)[steps // 2] for column in zip(*seconds, strict=True))
    answer = {"losses": losses, "forward_backward_seconds": forward_backward, "optimizer_seconds": step}
    return {**answer, "centers_gib": loss.centers.nbytes / 2**30}


def million(options: Options) -> dict[str, Any]:
    """Train a million classes for some steps."""
    found = []
    if options.device == "cpu" and not options.quick:
        found.append({**MILLION, **train_alone(train, options.threads[0], *MILLION.values(), 8)})
        print(found[-1])
    return {"million": found}


if __name__ == "__main__":
    main("soft_triple", plan, doc=__doc__, quick="the small cases, fewer rounds", targets=targets, more=million)
