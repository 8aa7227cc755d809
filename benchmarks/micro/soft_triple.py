"""The SoftTriple loss against the official formula, its block-wise form in PyTorch and pytorch-metric-learning.

python -m benchmarks.micro.soft_triple [--device cuda] [--threads 2 1] [--quick] [--json PATH]

The limit are the matrix products alone, as ours are made: in chunks of classes, the scores once more in the backward.
At the end a million classes are trained for some steps.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from benchmarks.environment import environment, save
from benchmarks.micro.harness import Case, Contender, Inputs, Result, as_dicts, compare, table
from paper_layers import SoftTripleLoss, soft_triple_loss
from paper_layers.soft_triple import param_groups
from testing.official import soft_triple as formulas

SHAPES = ((32, 64, 98, 10), (128, 512, 100, 10), (256, 512, 11318, 2), (256, 512, 11318, 10), (64, 256, 100000, 4))
QUICK = SHAPES[:2]
LARGE = 1 << 23  # Elements of centers from which a case takes seconds.
MILLION = {"classes": 1_000_000, "centers_per_class": 2, "dim": 128, "batch": 256}
GRAM_LIMIT = 8e9  # Bytes of all centers' products, of which there are then several.
CHUNK = 1 << 20  # Scores at a time in the limit.


def _sizes(case: Case) -> tuple[int, ...]:
    return tuple(case.params["B, d, C, K"])


def inputs(case: Case) -> Inputs:
    """Embeddings, centers, labels, tau."""
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
    """Centers in columns, and which pairs are of one class."""
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
    """The official formula, but for products of centers of one class alone."""
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
    """Scores; scores again, and what both gradients take."""
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
    """Scores, and what both gradients take, each at once."""
    scores = x @ centers.mT
    torch.mm(scores.mT, x, out=grad)
    return (scores @ centers)[0]


LIMIT = Contender("limit: its own products", own_products, "limit", inputs=_product_inputs)
BARE = Contender("three products at once", bare_products, "other", inputs=_product_inputs)
OURS = Contender("paper_layers.soft_triple_loss", ours, "ours")
OFFICIAL = Contender("official formula", official, "peer", inputs=official_inputs)
BLOCK_WISE = Contender("block-wise formula in PyTorch", block_wise, "peer", inputs=block_wise_inputs)
METRIC_LEARNING = Contender("pytorch-metric-learning", metric_learning, "peer", inputs=metric_learning_inputs)
# As they run where nobody has told glibc to keep the heap.
OURS_AT_DEFAULTS, BLOCK_WISE_AT_DEFAULTS = (
    replace(contender, name=f"{contender.name}, malloc's defaults", role="other", keeps_heap=False)
    for contender in (OURS, BLOCK_WISE)
)


def measure(device: str, threads: int, quick: bool) -> list[Result]:
    """Forward + backward; each case with processes of its own: together they hold several times the centers."""
    results = []
    for shape in QUICK if quick else SHAPES:
        _, d, c, k = shape
        for tau in (0.0, 0.2):
            # Large ones touch enough memory on their first run, and all processes have to fit beside each other.
            touched = 4 * c * k * d if c * k * d < LARGE else 0
            case = Case({"B, d, C, K": shape, "tau": tau}, inputs, touched, True, device)
            peers = (OFFICIAL, BLOCK_WISE, METRIC_LEARNING) if tau else (OFFICIAL, METRIC_LEARNING)
            rounds = (2, 0.1) if quick else (5, 0.3)
            if c * k * d >= LARGE:
                # With all centers' products a single run takes up to half a minute.
                rounds = (1 if tau and 4 * (c * k) ** 2 < GRAM_LIMIT else 3, 0.5)
                peers += (OURS_AT_DEFAULTS, BLOCK_WISE_AT_DEFAULTS) if tau else ()
            results += compare((OURS, *peers, BARE), [case], threads, *rounds, limit=LIMIT)
    return results


def targets(results: list[Result]) -> str:
    """What the package promises of the large cases, and what was measured."""
    lines = [f"  {'target, forward+backward':76}{'wanted':>8}{'measured':>10}"]

    def verdict(title: str, wanted: float, measured: float, at_least: bool) -> None:
        reached = measured >= wanted if at_least else measured <= wanted
        value = "none" if math.isnan(measured) else f"{measured:.2f}"
        lines.append(f"  {title:76}{wanted:8.2f}{value:>10}{': reached' if reached else ': MISSED'}")

    for case in dict.fromkeys(r.case for r in results):
        found = {r.contender: r for r in results if r.case == case and not r.error}
        shape, tau = next(r.params.values() for r in results if r.case == case)
        mine = found.get(OURS.name)
        if shape not in SHAPES[2:] or mine is None:
            continue
        verdict(f"{shape}, tau {tau:g}: times its own products", 1.5, mine.to_limit, False)
        peers = [r for r in found.values() if r.role == "peer"]
        gradients = 4 * math.prod(shape[1:]) + 4 * shape[0] * shape[1]  # Within each one's peak.
        for index, ratio in ((3, 2.0 if tau == 0 else 3.0), (4, 3.0)):
            if shape == SHAPES[index]:
                fastest = min((r.to_ours for r in peers), default=math.nan)
                verdict(f"{shape}, tau {tau:g}: times as fast as the best peer", ratio, fastest, True)
        if OURS_AT_DEFAULTS.name in found and BLOCK_WISE_AT_DEFAULTS.name in found:
            ratio = found[BLOCK_WISE_AT_DEFAULTS.name].median / found[OURS_AT_DEFAULTS.name].median
            title = f"{shape}, tau {tau:g}, malloc's defaults: times as fast as block-wise"
            verdict(title, 3.0, ratio, True)
        if shape == SHAPES[3] and tau == 0:
            least = min((r.peak - gradients for r in peers), default=math.nan)
            title = f"{shape}, tau {tau:g}: memory beyond gradients, as part of the best peer's"
            verdict(title, 0.125, (mine.peak - gradients) / least, False)
        if shape == SHAPES[4]:
            title = f"{shape}, tau {tau:g}: GiB beyond parameters and gradients"
            verdict(title, 1.0, (mine.peak - gradients) / 2**30, False)
    return "\n".join(lines) if len(lines) > 1 else ""


def _train(pipe: Any, classes: int, centers_per_class: int, dim: int, batch: int, threads: int, steps: int) -> None:
    """Steps on random inputs, and the most memory that a process ever held which does nothing else."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = {"losses": losses, "forward_backward_seconds": forward_backward, "optimizer_seconds": step}
    pipe.send({**answer, "peak_gib": peak / 2**20, "start_gib": start / 2**20, "centers_gib": _gib(loss.centers)})


def _gib(tensor: Tensor) -> float:
    return tensor.numel() * tensor.element_size() / 2**30


def train_million(threads: int, steps: int = 8) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_train, args=(theirs, *MILLION.values(), threads, steps))
    process.start()
    answer = mine.recv()
    process.join()
    return {**MILLION, "threads": threads, **answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="CPU threads, one run each")
    parser.add_argument("--quick", action="store_true", help="the small cases, fewer rounds")
    parser.add_argument("--json", metavar="PATH", help="write all numbers there")
    options = parser.parse_args()

    head = environment(options.device)
    print("\n".join(f"{name}: {value}" for name, value in head.items()), "\ncases: (B, d, C, K), tau")
    results = []
    for threads in options.threads:
        part = measure(options.device, threads, options.quick)
        print(table(part), targets(part), sep="\n\n")
        results += part
    million = []
    if options.device == "cpu" and not options.quick:
        million.append(train_million(options.threads[0]))
        print(million[-1])
    if options.json:
        save(options.json, {"benchmark": "soft_triple", **head, "results": as_dicts(results), "million": million})


if __name__ == "__main__":
    main()
