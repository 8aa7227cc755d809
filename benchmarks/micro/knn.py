"""Exact k-nearest neighbours against torch-cluster, SciPy, Faiss, PyKeOps, cdist with topk and DeepGCN's own formula.

python -m benchmarks.micro.knn [--device cuda] [--threads 2 1] [--quick] [--only TEXT] [--json PATH]
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.micro.command import Options, main
from benchmarks.micro.harness import Case, Comparison, Contender, Inputs
from paper_layers import knn

SHAPES = (  # B, N, C, k, dilation
    (1, 1024, 3, 16, 1),
    (8, 4096, 3, 16, 1),
    (1, 16384, 3, 16, 1),
    (1, 100_000, 3, 16, 1),
    (1, 1_000_000, 3, 16, 1),
    (1, 4096, 64, 16, 1),
    (8, 4096, 64, 16, 1),
    (1, 4096, 64, 448, 1),
    (1, 4096, 64, 16, 28),
    (1, 16384, 64, 16, 1),
)
Shape = tuple[int, int, int, int, int]
LARGEST_MATRIX = 2**28  # Largest N x N matrix that the formulas may store, in elements.


def ours(x: Tensor, k: int, dilation: int) -> Tensor:
    return knn(x, k=k, dilation=dilation)[1]


def official(x: Tensor, k: int, dilation: int) -> Tensor:
    """Compute |x|^2 - 2 x.y + |y|^2, as the official dense code does."""
    _check_size(x)
    square = x.square().sum(-1, keepdim=True)
    distance = square - 2 * x @ x.mT + square.mT
    return distance.topk(k * dilation, largest=False).values[..., ::dilation]


def cdist(x: Tensor, k: int, dilation: int) -> Tensor:
    _check_size(x)
    return torch.cdist(x, x).topk(k * dilation, largest=False).values[..., ::dilation].square()


def torch_cluster(x: Tensor, k: int, dilation: int) -> Tensor:
    from torch_cluster import knn as cluster_knn

    if x.shape[1] > 100_000:
        raise ValueError("half a minute a call")
    flat, batch = x.flatten(0, 1), torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1])
    query, point = cluster_knn(flat, flat, k * dilation, batch, batch)
    distance = (flat[query] - flat[point]).square().sum(-1)
    return distance.view(*x.shape[:2], -1)[..., ::dilation]


def scipy(x: Tensor, k: int, dilation: int) -> Tensor:
    from scipy.spatial import cKDTree

    threads = torch.get_num_threads()
    found = [cKDTree(cloud).query(cloud, k * dilation, workers=threads)[0] for cloud in x.numpy()]
    return torch.stack([torch.from_numpy(distance).square() for distance in found])[..., ::dilation]


def faiss(x: Tensor, k: int, dilation: int) -> Tensor:
    import faiss

    if x.shape[1] > 16384:
        raise ValueError("all pairs would take minutes")
    faiss.omp_set_num_threads(torch.get_num_threads())
    found = [faiss.knn(cloud, cloud, k * dilation)[0] for cloud in x.numpy()]
    return torch.stack([torch.from_numpy(distance) for distance in found])[..., ::dilation]


def pykeops(x: Tensor, k: int, dilation: int) -> Tensor:
    from pykeops.torch import LazyTensor

    if x.shape[1] > 16384:
        raise ValueError("all pairs would take minutes")
    difference = LazyTensor(x[:, :, None].contiguous()) - LazyTensor(x[:, None].contiguous())
    return (difference**2).sum(-1).Kmin(k * dilation, dim=2)[..., ::dilation]


def _check_size(x: Tensor) -> None:
    if x.shape[0] * x.shape[1] ** 2 > LARGEST_MATRIX:
        raise MemoryError(f"an N x N matrix of {x.shape[0] * x.shape[1] ** 2 * 4 / 2**30:.0f} GiB")


def _product(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """Compute all inner products, block by block in the same memory."""
    if x.shape[0] * x.shape[1] ** 2 > 2**32:
        raise ValueError("all pairs would take minutes")
    for cloud, others in zip(x, y, strict=True):
        for rows in cloud.split(len(out)):
            for columns in others.split(out.shape[1]):
                torch.mm(rows, columns.mT, out=out[: len(rows), : len(columns)])
    return out


def _product_inputs(case: Case) -> Inputs:
    x, *_ = inputs(case)
    return x, x.clone(), torch.empty(min(256, x.shape[1]), min(1024, x.shape[1]), device=x.device)


# The products of any method without an index; trees on three channels compute fewer.
LIMIT = Contender("limit: sgemm of all pairs", _product, "limit", inputs=_product_inputs)
CONTENDERS = (
    Contender("paper_layers.knn", ours, "ours"),
    Contender("torch-cluster", torch_cluster, "peer"),
    Contender("scipy cKDTree", scipy, "peer"),
    Contender("faiss flat", faiss, "peer"),
    Contender("PyKeOps", pykeops, "peer"),
    Contender("cdist + topk", cdist, "peer"),
    Contender("official formula", official, "peer"),
)


def inputs(case: Case) -> Inputs:
    b, n, c, k, dilation = case.params["shape"]
    return torch.randn(b, n, c, device=case.device), k, dilation


def make_case(shape: Shape) -> Case:
    b, n, c, k, _ = shape
    return Case({"shape": shape}, inputs, b * n * (4 * c + 12 * k), backward=False)


def plan(options: Options) -> list[Comparison]:
    cases = [make_case(shape) for shape in SHAPES if shape[1] <= 16384 or not options.quick]
    return [Comparison(CONTENDERS, cases, LIMIT, rounds=4, seconds=0.2)]


if __name__ == "__main__":
    main("knn", plan, doc=__doc__, quick="up to 16384 points, fewer rounds")
