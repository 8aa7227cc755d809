"""The SoftTriple loss as a module with its centers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core.tracing import Leaf
from paper_layers.ops.soft_triple.logits import soft_triple_logits
from paper_layers.ops.soft_triple.loss import soft_triple_loss
from paper_layers.ops.soft_triple.rows import REDUCTIONS
from paper_layers.soft_triple import _merging
from paper_layers.soft_triple._metric_learning import (
    as_metric_learning_loss,
    check_references,
    count_rows,
    counts_to_weights,
)


class SoftTripleLoss(Leaf):
    r"""Learn embeddings with several centers for each class and no triplets: the SoftTriple loss.

    .. math:: \frac1B \sum_i -\log \frac{e^{\lambda (S_{i y_i} - \delta)}}
              {e^{\lambda (S_{i y_i} - \delta)} + \sum_{c \ne y_i} e^{\lambda S_{ic}}}
              + \tau R(w), \quad
              S_{ic} = \sum_k \operatorname{softmax}_k(x_i^\top w_{ck} / \gamma)\, x_i^\top w_{ck}

    with unit vectors x and w. Qian, Shang, Sun, Hu, Li, Jin, "SoftTriple Loss: Deep Metric Learning Without Triplet
    Sampling", ICCV 2019, equation 9. The regulariser R, half the mean distance between the centers of a class, merges
    centers that are not needed; see `paper_layers.soft_triple_loss`. With K = 1 it is a soft-max loss on normalised
    vectors.

    Trainers, miners and wrappers of pytorch-metric-learning accept it as one of their own losses.

    Train the centers along with the network. In the paper their learning rate is a hundred times the network's, with
    Adam at ``eps=0.01``; `param_groups` explains why.

    Args:
        num_classes: Number of classes C.
        embedding_dim: Size d of the embeddings.
        centers_per_class: Number of centers K per class.
        la: Scale of the logits.
        gamma: Temperature of the soft-max over a class's centers, above 0.
        tau: Weight of the regulariser; 0 for none.
        margin: Subtracted from the similarity to the row's own class.
        ignore_index: Label of rows to ignore.
        reduction: "mean", "sum" or "none".
        chunk_size: Number of classes computed at a time, on the CPU by each thread; default: by the caches' size.

    Attributes:
        centers: Parameter of shape (num_classes, centers_per_class, embedding_dim), of any length.

    Raises:
        TypeError: A number has the wrong type.
        ValueError: A number is out of range, or `reduction` is unknown.

    Example:
        >>> import torch, paper_layers
        >>> loss = paper_layers.SoftTripleLoss(num_classes=100, embedding_dim=64)
        >>> embeddings = torch.randn(8, 64, requires_grad=True)
        >>> loss(embeddings, torch.randint(100, (8,))).backward()
        >>> loss.get_logits(embeddings).shape
        torch.Size([8, 100])
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an instance of a class that pytorch-metric-learning accepts, if that package is imported."""
        return super().__new__(as_metric_learning_loss(cls))

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        centers_per_class: int = 10,
        *,
        la: float = 20.0,
        gamma: float = 0.1,
        tau: float = 0.2,
        margin: float = 0.01,
        ignore_index: int = -100,
        reduction: str = "mean",
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # Not the constructor of pytorch-metric-learning's base class.
        num_classes, embedding_dim, centers_per_class = checks.positive(
            num_classes=num_classes, embedding_dim=embedding_dim, centers_per_class=centers_per_class
        )
        factors = {"la": la, "gamma": gamma, "tau": tau, "margin": margin}
        la, gamma, tau, margin = (checks.number(name, value) for name, value in factors.items())
        if not gamma > 0:
            raise ValueError(f"gamma: expected more than 0, got {gamma!r}")
        if not tau >= 0:
            raise ValueError(f"tau: expected at least 0, got {tau!r}")
        checks.choice("reduction", reduction, REDUCTIONS)
        ignore_index = checks.integer("ignore_index", ignore_index, -(2**63))
        if chunk_size is not None:
            chunk_size = checks.integer("chunk_size", chunk_size, 1)
        self.num_classes, self.embedding_dim, self.centers_per_class = num_classes, embedding_dim, centers_per_class
        self.la, self.gamma, self.tau, self.margin = la, gamma, tau, margin
        self.ignore_index, self.reduction, self.chunk_size = ignore_index, reduction, chunk_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.centers = nn.Parameter(
            torch.empty(self.num_classes, self.centers_per_class, self.embedding_dim, **factory)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new centers from U(-b, b) with b = (C K)^(-1/2), as the official code does."""
        bound = (self.num_classes * self.centers_per_class) ** -0.5
        nn.init.uniform_(self.centers, -bound, bound)

    def extra_repr(self) -> str:
        """Return all arguments."""
        names = ("centers_per_class", "la", "gamma", "tau", "margin", "ignore_index", "reduction", "chunk_size")
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.num_classes}, {self.embedding_dim}, {options}"

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of embeddings with their labels.

        Args:
            embeddings: Shape (B, embedding_dim).
            labels: Classes or `ignore_index`, of any integer dtype, shape (B,).
            indices_tuple: Pairs or triplets of rows from a miner of pytorch-metric-learning. As in its SoftTripleLoss,
                a row's loss is weighted by the number of times the row occurs in them, divided by the largest such
                number; if they are empty, all weights are 1.
            ref_emb: None or `embeddings`, as the rows are compared only with centers.
            ref_labels: None, or `labels`.
        """
        if hasattr(self.centers, "full_tensor"):
            raise TypeError(
                "centers: expected a Tensor, got a DTensor (with FSDP, call the loss, not its forward; "
                "to shard classes over ranks, use ShardedSoftTripleLoss)"
            )
        check_references(embeddings, labels, ref_emb, ref_labels)
        weights = None
        if indices_tuple is not None:
            weights = counts_to_weights(count_rows(indices_tuple, embeddings))
        return soft_triple_loss(
            embeddings,
            self.centers,
            labels,
            la=self.la,
            gamma=self.gamma,
            tau=self.tau,
            margin=self.margin,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            chunk_size=self.chunk_size,
            weights=weights,
        )

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Return logits (B, num_classes) of embeddings (B, embedding_dim): scaled similarities, without the margin."""
        options: dict[str, Any] = {"la": self.la, "gamma": self.gamma, "chunk_size": self.chunk_size}
        return soft_triple_logits(embeddings, self._all_centers(), **options)

    def distinct_centers(self, threshold: float) -> Tensor:
        """Count the centers of each class that have not merged: int64 of shape (num_classes,).

        Two unit centers of a class count as one if their Euclidean distance (0 to 2) is below `threshold`, or if other
        centers connect them in such steps. Section 4 of the paper counts the centers that the regulariser merged.

        Example:
            >>> import paper_layers
            >>> paper_layers.SoftTripleLoss(num_classes=3, embedding_dim=64).distinct_centers(0.1)
            tensor([10, 10, 10])
        """
        return _merging.distinct_centers(self._all_centers(), threshold)

    def merge_centers(self, threshold: float) -> tuple[Tensor, Tensor]:
        """Return the distinct unit centers (M, embedding_dim), class by class, and their classes, int64 of shape (M,).

        Centers that `distinct_centers` counts as one are replaced by their normalised mean.

        Example:
            >>> import paper_layers
            >>> centers, classes = paper_layers.SoftTripleLoss(3, 64, centers_per_class=2).merge_centers(0.1)
            >>> centers.shape, classes
            (torch.Size([6, 64]), tensor([0, 0, 1, 1, 2, 2]))
        """
        return _merging.merge_centers(self._all_centers(), threshold)

    def _all_centers(self) -> Tensor:
        """Return all centers, also if FSDP has sharded them."""
        centers = self.centers
        return centers.full_tensor() if hasattr(centers, "full_tensor") else centers
