"""Measures of retrieval and clustering, as in metric-learning papers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers._core import checks
from paper_layers.ops.knn import knn


def recall_at_k(
    embeddings: Tensor,
    labels: Tensor,
    k: int | Sequence[int] = (1, 2, 4, 8),
    *,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
) -> dict[int, float]:
    """Compute the share of queries with a sample of their own class among the k nearest by cosine.

    The Recall@k of Qian et al., "SoftTriple Loss", ICCV 2019, section 4, as usual in metric learning: every sample is a
    query, and all others are searched. The search is exact and stores N x max(k) neighbours, never N x N distances.

    Ties are broken by index. A query is left out if no other sample has its class. A zero vector has distance 1/2
    to every non-zero vector.

    Args:
        embeddings: Shape (N, d), floating point, not necessarily normalised.
        labels: Classes, integers or bool of shape (N,).
        k: One or several numbers of neighbours; may exceed the number of samples.
        gallery: Samples to search in place of the other queries, shape (M, d).
        gallery_labels: Classes of the gallery, integers or bool of shape (M,).

    Returns:
        The recall for each k, from 0 to 1; NaN if all queries are left out.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape is wrong, `k` is below 1 or empty, or only one of `gallery` and `gallery_labels` is given.

    Example:
        >>> import torch
        >>> from paper_layers.soft_triple import recall_at_k
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.6, 0.5]])
        >>> recall_at_k(embeddings, torch.tensor([0, 0, 1, 1]), k=(1, 3))
        {1: 0.75, 3: 1.0}
    """
    labels = _samples("embeddings", embeddings, "labels", labels)
    if (gallery is None) != (gallery_labels is None):
        missing, given = ("gallery", "gallery_labels") if gallery is None else ("gallery_labels", "gallery")
        raise ValueError(f"{missing}: expected a Tensor, as {given} is given, got None")
    alone = gallery is None or gallery_labels is None
    if gallery is not None and gallery_labels is not None:
        gallery_labels = _samples("gallery", gallery, "gallery_labels", gallery_labels)
    wanted = list(k) if isinstance(k, Iterable) else [k]
    if not wanted:
        raise ValueError("k: expected at least one number, got none")
    wanted = [checks.integer("k", number, 1) for number in wanted]

    searched = labels if gallery_labels is None else gallery_labels
    findable = _count(labels, searched) > (1 if alone else 0)
    index, _ = knn(
        embeddings.detach(),
        None if gallery is None else gallery.detach(),
        k=max(1, min(max(wanted), len(searched))),
        metric="cosine",
        include_self=not alone,
    )
    if len(searched) == 0:
        index = index.new_full(index.shape, -1)
        searched = labels.new_zeros(1)
    hits = (searched[index.clamp(min=0)] == labels[:, None]) & (index >= 0)
    hits = hits[findable]
    return {number: hits[:, :number].any(1).double().mean().item() for number in wanted}


def nmi(embeddings: Tensor, labels: Tensor, *, seed: int = 0) -> float:
    """Compute the normalised mutual information of the classes and as many k-means clusters.

    As in Qian et al., "SoftTriple Loss", ICCV 2019, section 4: scikit-learn's k-means clusters the normalised
    embeddings, and the mutual information of clusters and classes is divided by the mean of their entropies. Needs
    scikit-learn: ``pip install paper-layers[evaluation]``.

    Args:
        embeddings: Shape (N, d), floating point.
        labels: Classes, integers or bool of shape (N,).
        seed: Seed of the initial clusters.

    Returns:
        A number from 0 (clusters independent of the classes) to 1 (clusters equal to the classes).

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape is wrong, or there are no samples.

    Example:
        >>> import torch
        >>> from paper_layers.soft_triple import nmi
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> round(nmi(embeddings, torch.tensor([7, 7, 3, 3])), 6)
        1.0
    """
    labels = _samples("embeddings", embeddings, "labels", labels)
    if len(labels) == 0:
        raise ValueError("embeddings: expected at least one sample, got none")
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import normalized_mutual_info_score
    except ImportError as error:
        raise ImportError("nmi needs scikit-learn: pip install paper-layers[evaluation]") from error
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    points = F.normalize(embeddings.detach().to(dtype), dim=1).cpu().numpy()
    clusters = KMeans(len(labels.unique()), random_state=seed).fit_predict(points)
    return float(normalized_mutual_info_score(labels.cpu().numpy(), clusters, average_method="arithmetic"))


def _samples(name: str, embeddings: Tensor, label_name: str, labels: Tensor) -> Tensor:
    """Check for embeddings (N, d) and labels (N,), integers or bool, on one device; return the labels as int64."""
    checks.floating(name, embeddings)
    checks.shape(name, embeddings, ("N", "d"))
    if not isinstance(labels, Tensor) or labels.dtype.is_floating_point or labels.dtype.is_complex:
        got = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(f"{label_name}: expected a Tensor of integers, got {got}")
    checks.same_device(label_name, labels, name, embeddings)
    checks.shape(label_name, labels, (len(embeddings),))
    return labels.long()


def _count(labels: Tensor, among: Tensor) -> Tensor:
    """Count how often each label occurs in `among`."""
    ordered = among.sort().values
    first, past = (torch.searchsorted(ordered, labels, right=right) for right in (False, True))
    return past - first
