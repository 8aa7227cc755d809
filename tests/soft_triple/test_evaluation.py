"""Recall@k and NMI against all pairs in float64 and against pytorch-metric-learning."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor

from paper_layers.soft_triple import nmi, recall_at_k

KS = (1, 2, 4, 8)


def samples(n: int, classes: int, seed: int = 0, d: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    middle = torch.randn(classes, d, generator=generator)
    return (middle[labels] + torch.randn(n, d, generator=generator)) * 3, labels


def brute_force(x: Tensor, labels: Tensor, k: int, gallery: Tensor, searched: Tensor, alone: bool) -> float:
    hits = []
    others = [row / np.linalg.norm(row) for row in gallery.double().numpy()]
    for i, query in enumerate(x.double().numpy()):
        allowed = [j for j in range(len(others)) if not (alone and i == j)]
        allowed.sort(key=lambda j: (-(others[j] @ query), j))
        same = [bool(searched[j] == labels[i]) for j in allowed]
        if any(same):
            hits.append(any(same[:k]))
    return sum(hits) / len(hits) if hits else math.nan


@pytest.mark.parametrize(("n", "classes"), [(60, 12), (40, 35), (5, 2)])  # with lone samples; fewer than 8 others
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_recall(n: int, classes: int, dtype: torch.dtype) -> None:
    x, labels = samples(n, classes)
    x = x.to(dtype)
    found = recall_at_k(x, labels, KS)
    assert found == {k: pytest.approx(brute_force(x, labels, k, x, labels, True)) for k in KS}
    assert recall_at_k(x.requires_grad_(), labels.int(), 4) == {4: found[4]}


def test_gallery() -> None:
    (x, labels), (gallery, searched) = samples(30, 20, 1), samples(25, 20, 2)
    found = recall_at_k(x, labels, KS, gallery=gallery, gallery_labels=searched)
    assert found == {k: pytest.approx(brute_force(x, labels, k, gallery, searched, False)) for k in KS}
    nothing = recall_at_k(x, labels, gallery=gallery[:0], gallery_labels=searched[:0])
    assert all(math.isnan(value) for value in nothing.values())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16])
def test_labels_of_any_dtype(dtype: torch.dtype) -> None:
    x, labels = samples(30, 2)
    expected = recall_at_k(x, labels, KS, gallery=x, gallery_labels=labels)
    assert recall_at_k(x, labels.to(dtype), KS, gallery=x, gallery_labels=labels) == expected


def test_ties_lone_and_empty() -> None:
    x = torch.ones(4, 2)  # All distances are equal: the nearest neighbours are 1, 0, 0, 0.
    assert recall_at_k(x, torch.tensor([5, -2, -2, 5]), (1, 2)) == {1: 0.25, 2: 0.75}
    assert math.isnan(recall_at_k(x, torch.arange(4))[1])
    assert math.isnan(recall_at_k(x[:0], torch.arange(0))[1])
    assert math.isnan(recall_at_k(x[:1], torch.arange(1))[1])


def test_pytorch_metric_learning() -> None:
    x, labels = samples(200, 40, 3)
    labels[:3] = torch.arange(100, 103)  # Without a second sample of their class.
    theirs = AccuracyCalculator(include=("precision_at_1",), k=1, device=torch.device("cpu"))
    unit = torch.nn.functional.normalize(x)
    assert recall_at_k(x, labels)[1] == pytest.approx(theirs.get_accuracy(unit, labels)["precision_at_1"])


def test_nmi() -> None:
    x, labels = samples(90, 5)
    clusters = None

    def our_clusters(points: Tensor, count: int) -> Tensor:
        from sklearn.cluster import KMeans

        nonlocal clusters
        clusters = torch.from_numpy(KMeans(count, random_state=3).fit_predict(points.numpy()))
        return clusters

    unit = torch.nn.functional.normalize(x)
    theirs = AccuracyCalculator(include=("NMI",), kmeans_func=our_clusters, device=torch.device("cpu"))
    assert nmi(x, labels, seed=3) == pytest.approx(theirs.get_accuracy(unit, labels)["NMI"])
    joint = torch.zeros(5, 5, dtype=torch.float64)
    for label, cluster in zip(labels, clusters, strict=True):
        joint[label, cluster] += 1 / len(labels)
    entropy = [-(p * p.log()).sum() for p in (joint.sum(0), joint.sum(1))]
    shared = torch.special.xlogy(joint, joint / joint.sum(1, keepdim=True) / joint.sum(0)).nan_to_num().sum()
    assert nmi(x, labels, seed=3) == pytest.approx((2 * shared / sum(entropy)).item())
    assert 0 < nmi(x.bfloat16(), labels) < 1
    far = torch.eye(5).repeat(4, 1)
    assert nmi(far, torch.arange(5).repeat(4)) == pytest.approx(1)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"paper-layers\[evaluation\]"):
        nmi(*samples(6, 2))


def test_wrong_arguments() -> None:
    x, labels = samples(6, 2)
    for arguments, kind, message in (
        (([1.0], labels), TypeError, "embeddings: expected a Tensor, got list"),
        ((x[0], labels), ValueError, r"embeddings: expected shape \(N, d\), got \(6,\)"),
        ((x, labels.float()), TypeError, "labels: expected a Tensor of integers, got torch.float32"),
        ((x, labels[:2]), ValueError, r"labels: expected shape \(6,\), got \(2,\)"),
    ):
        for function in (recall_at_k, nmi):
            with pytest.raises(kind, match=message):
                function(*arguments)
    for k, kind, message in (
        (0, ValueError, "k: expected at least 1, got 0"),
        ((1, 2.5), TypeError, "k: expected an int, got 2.5"),
        ((), ValueError, "k: expected at least one number"),
    ):
        with pytest.raises(kind, match=message):
            recall_at_k(x, labels, k)
    with pytest.raises(ValueError, match="gallery_labels: expected a Tensor, as gallery is given"):
        recall_at_k(x, labels, gallery=x)
    with pytest.raises(ValueError, match="at least one sample"):
        nmi(x[:0], labels[:0])
