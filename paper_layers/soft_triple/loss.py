"""The SoftTriple loss with its centers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core.tracing import Leaf
from paper_layers.ops.soft_triple.logits import soft_triple_logits
from paper_layers.ops.soft_triple.loss import REDUCTIONS, soft_triple_loss
from paper_layers.soft_triple import merging
from paper_layers.soft_triple._metric_learning import (
    check_references,
    counts_of_tuples,
    taken_by_metric_learning,
    weights_of_counts,
)


class SoftTripleLoss(Leaf):
    r"""Learn embeddings with several centers for each class and no triplets: the SoftTriple loss.

    .. math:: \frac1B \sum_i -\log \frac{e^{\lambda (S_{i y_i} - \delta)}}
              {e^{\lambda (S_{i y_i} - \delta)} + \sum_{c \ne y_i} e^{\lambda S_{ic}}}
              + \tau R(w), \quad
              S_{ic} = \sum_k \operatorname{softmax}_k(x_i^\top w_{ck} / \gamma)\, x_i^\top w_{ck}

    with unit vectors x and w, of Qian, Shang, Sun, Hu, Li, Jin, "SoftTriple Loss: Deep Metric Learning Without Triplet
    Sampling", ICCV 2019, equation 9; the regulariser R is half the mean distance between centers of a class, so that
    centers which are not needed merge. See `paper_layers.soft_triple_loss` for it and for the arguments that are not
    explained here. With K = 1 it is a soft-max loss on normalised vectors.

    Trainers, miners and wrappers of pytorch-metric-learning take it for a loss of their own, and call it as such.

    The centers are trained along with the network. In the paper their learning rate is a hundred times the network's,
    with Adam at ``eps=0.01``: their lengths do not matter to the loss, but scale their gradients, and with Adam's usual
    eps every center moves at the full rate, however small its gradient.

    Args:
        num_classes: Classes C.
        embedding_dim: Size d of the embeddings.
        centers_per_class: Centers K of each class.
        la: Scale of the logits.
        gamma: How softly the nearest center is chosen, above 0.
        tau: Weight of the regulariser; 0 for none.
        margin: Taken from the similarity to the row's own class.
        ignore_index: A label whose rows do not count.
        reduction: "mean", "sum" or "none".
        chunk_size: Classes at a time, of each thread on the CPU; default as caches hold.
        device: Where the centers are.
        dtype: Their dtype.

    Attributes:
        centers: Parameter of shape (num_classes, centers_per_class, embedding_dim), of any length.

    Raises:
        TypeError: A number has the wrong type.
        ValueError: A number is out of range, or `reduction` is none of the three.

    Example:
        >>> import torch, paper_layers
        >>> loss = paper_layers.SoftTripleLoss(num_classes=100, embedding_dim=64)
        >>> embeddings = torch.randn(8, 64, requires_grad=True)
        >>> loss(embeddings, torch.randint(100, (8,))).backward()
        >>> loss.get_logits(embeddings).shape
        torch.Size([8, 100])
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An instance of a class that pytorch-metric-learning accepts, where that is imported."""
        return super().__new__(taken_by_metric_learning(cls))

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        centers_per_class: int = 10,
        la: float = 20.0,
        gamma: float = 0.1,
        tau: float = 0.2,
        margin: float = 0.01,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # And not that of pytorch-metric-learning's base class.
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
        """Draw new centers, as the official code does: uniform within one over the root of their number."""
        bound = (self.num_classes * self.centers_per_class) ** -0.5
        nn.init.uniform_(self.centers, -bound, bound)

    def extra_repr(self) -> str:
        """All arguments."""
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
        """The loss of embeddings (B, embedding_dim) with labels (B,), of any integer dtype.

        Args:
            embeddings: Shape (B, embedding_dim).
            labels: Classes or `ignore_index`, integers of shape (B,).
            indices_tuple: What a miner of pytorch-metric-learning found: pairs or triplets of rows. As in its own
                SoftTripleLoss, a row's loss weighs as much as it occurs in them, relative to the row that occurs most;
                without any, all rows weigh alike.
            ref_emb: None, or `embeddings`: the rows are compared with centers only.
            ref_labels: None, or `labels`.
        """
        if hasattr(self.centers, "full_tensor"):
            raise TypeError(
                "centers: expected a Tensor, got a DTensor (FSDP gathers it if the loss is called, not its forward; "
                "to spread classes over ranks, use ShardedSoftTripleLoss)"
            )
        check_references(embeddings, labels, ref_emb, ref_labels)
        weights = None
        if indices_tuple is not None:
            weights = weights_of_counts(counts_of_tuples(indices_tuple, embeddings))
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
        """Logits (B, num_classes) of embeddings (B, embedding_dim): scaled similarities, without the margin."""
        options: dict[str, Any] = {"la": self.la, "gamma": self.gamma, "chunk_size": self.chunk_size}
        return soft_triple_logits(embeddings, self._all_centers(), **options)

    def distinct_centers(self, threshold: float) -> Tensor:
        """Count the centers of each class that have not merged: int64 of shape (num_classes,).

        Two unit centers are closer than `threshold` in Euclidean distance, 0 to 2, or connected by others of their
        class which are: then they count as one. The regulariser makes such centers, which the paper counts in its
        section 4.

        Example:
            >>> import paper_layers
            >>> paper_layers.SoftTripleLoss(num_classes=3, embedding_dim=64).distinct_centers(0.1)
            tensor([10, 10, 10])
        """
        return merging.distinct_centers(self._all_centers(), threshold)

    def merge_centers(self, threshold: float) -> tuple[Tensor, Tensor]:
        """The unit centers (M, embedding_dim) that are left, class by class, and their classes, int64 of shape (M,).

        Centers that `distinct_centers` counts as one become the direction of the mean of their unit vectors.

        Example:
            >>> import paper_layers
            >>> centers, classes = paper_layers.SoftTripleLoss(3, 64, centers_per_class=2).merge_centers(0.1)
            >>> centers.shape, classes
            (torch.Size([6, 64]), tensor([0, 0, 1, 1, 2, 2]))
        """
        return merging.merge_centers(self._all_centers(), threshold)

    def _all_centers(self) -> Tensor:
        """All of them, where FSDP holds but a part outside of forward."""
        centers = self.centers
        return centers.full_tensor() if hasattr(centers, "full_tensor") else centers
