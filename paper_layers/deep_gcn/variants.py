"""Variants of DeepGCN: classify clouds, segment parts of objects, and label the nodes of a static graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers.deep_gcn._clouds import broadcast_to_rows, global_pool, ptr_of
from paper_layers.deep_gcn.nets import DeepGCN, NetOptions, Prediction
from paper_layers.deep_gcn.perceptron import LayerOptions, Perceptron, call_perceptron

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _PooledDeepGCN(DeepGCN):
    """Base of the networks that predict from embeddings pooled by maximum and mean."""

    _head_options: ClassVar[LayerOptions] = {"bias": False}
    _num_parts: ClassVar[int]
    embedding_dim: int

    def _add_prediction(self, num_classes: int, dropout: float, options: LayerOptions) -> None:
        fusion: LayerOptions = {**options, "act": "leakyrelu", "bias": False}
        leaky: LayerOptions = {**fusion, "bias": True}
        last: LayerOptions = {**leaky, "act": None, "norm": None}
        self.fusion = Perceptron(self.num_features, self.embedding_dim, **fusion)
        self.prediction = Prediction(
            Perceptron(self._num_parts * self.embedding_dim, 512, **leaky, dropout=dropout),
            Perceptron(512, 256, **leaky, dropout=dropout),
            Perceptron(256, num_classes, **last),
        )


class DeepGCNClassifier(_PooledDeepGCN):
    r"""DeepGCN that classifies clouds, as for ModelNet40.

    .. math:: y = h([\max_i f(X)_i, \operatorname{mean}_i f(X)_i])

    The network of the journal version, Li et al., "DeepGCNs: Making GCNs Go as Deep as CNNs", 2021, section 4.3.

    Args:
        in_channels: Channels of the input, coordinates first.
        num_classes: Channels of the output.
        embedding_dim: Channels of f.
        **options: Options of `DeepGCN`; by default 14 blocks, 9 neighbours and a dropout of 0.5 between the last
            layers.

    Example:
        >>> import torch
        >>> from paper_layers.deep_gcn import DeepGCNClassifier
        >>> DeepGCNClassifier(3, 40, blocks=7)(torch.randn(2, 256, 3)).shape
        torch.Size([2, 40])
    """

    _num_parts = 2

    def __init__(
        self, in_channels: int = 3, num_classes: int = 40, *, embedding_dim: int = 1024, **options: Unpack[NetOptions]
    ):
        self.embedding_dim = embedding_dim
        published: NetOptions = {"blocks": 14, "k": 9, "dropout": 0.5, **options}
        super().__init__(in_channels, num_classes, **published)

    def forward(self, x: Tensor, batch: Tensor | None = None, ptr: Tensor | None = None) -> Tensor:
        """Classify the clouds of (B, N, C), or of (N, C) with `batch` or `ptr`: (B, num_classes)."""
        ptr = ptr_of(x, batch, ptr)
        fused = call_perceptron(self.fusion, self.features(x, ptr), ptr)
        return self.predict([global_pool(fused, ptr, "max"), global_pool(fused, ptr, "mean")])


class DeepGCNPartSegmenter(_PooledDeepGCN):
    r"""DeepGCN that labels the parts of objects, as for PartNet.

    .. math:: y_i = \log \operatorname{softmax} h([\max_i f(X)_i, \operatorname{mean}_i f(X)_i, f(X)_i])

    The network of the journal version, Li et al., "DeepGCNs: Making GCNs Go as Deep as CNNs", 2021, section 4.2. As in
    the official code, the output is the logarithm of probabilities; cross entropy accepts it as logits.

    Args:
        in_channels: Channels of the input, coordinates first.
        num_classes: Channels of the output.
        embedding_dim: Channels of f.
        **options: Options of `DeepGCN`; by default 9 neighbours and a dropout of 0.5 between the last layers.

    Example:
        >>> import torch
        >>> from paper_layers.deep_gcn import DeepGCNPartSegmenter
        >>> DeepGCNPartSegmenter(3, 15, blocks=7)(torch.randn(2, 256, 3)).shape
        torch.Size([2, 256, 15])
    """

    _num_parts = 3

    def __init__(self, in_channels: int, num_classes: int, *, embedding_dim: int = 1024, **options: Unpack[NetOptions]):
        self.embedding_dim = embedding_dim
        published: NetOptions = {"k": 9, "dropout": 0.5, **options}
        super().__init__(in_channels, num_classes, **published)

    def forward(self, x: Tensor, batch: Tensor | None = None, ptr: Tensor | None = None) -> Tensor:
        """Label the points of (B, N, C), or of (N, C) with `batch` or `ptr`: log-probabilities (..., num_classes)."""
        ptr = ptr_of(x, batch, ptr)
        fused = call_perceptron(self.fusion, self.features(x, ptr), ptr)
        pooled = [broadcast_to_rows(global_pool(fused, ptr, reduction), fused, ptr) for reduction in ("max", "mean")]
        return F.log_softmax(self.predict([*pooled, fused], ptr), -1)


class StaticDeepGCN(DeepGCN):
    r"""DeepGCN that labels the nodes of a static graph, as for PPI.

    .. math:: y_i = h([X_i, \max_c f(X)_{ic}])

    The network of the journal version, Li et al., "DeepGCNs: Making GCNs Go as Deep as CNNs", 2021, section 4.4. As
    in the official code, the maximum is over the channels of f.

    Args:
        in_channels: Channels of the input.
        num_classes: Channels of the output.
        **options: Options of `DeepGCN`; by default 256 channels, 14 blocks, "mr" and a dropout of 0.2 between the last
            layers. The options of the search for neighbours have no effect.

    Example:
        >>> import torch
        >>> from paper_layers.deep_gcn import StaticDeepGCN, from_edge_index
        >>> edges = torch.randint(100, (2, 800))
        >>> net = StaticDeepGCN(50, 121, blocks=7)
        >>> net(torch.randn(100, 50), from_edge_index(edges, 100)).shape
        torch.Size([100, 121])
    """

    def __init__(self, in_channels: int, num_classes: int, **options: Unpack[NetOptions]):
        published: NetOptions = {"channels": 256, "blocks": 14, "conv": "mr", "dropout": 0.2, **options}
        super().__init__(in_channels, num_classes, **published)

    def _add_prediction(self, num_classes: int, dropout: float, options: LayerOptions) -> None:
        fusion: LayerOptions = {**options, "norm": None}
        last: LayerOptions = {**fusion, "act": None}
        self.fusion = Perceptron(self.num_features, 1024, **fusion)
        self.prediction = Prediction(
            Perceptron(1 + self.num_features, 512, **options),
            nn.Dropout(dropout),
            Perceptron(512, 256, **options),
            nn.Dropout(dropout),
            Perceptron(256, num_classes, **last),
        )

    def forward(  # type: ignore[override]
        self, x: Tensor, index: Tensor | None = None, *, edge_index: Tensor | None = None
    ) -> Tensor:
        """Label the nodes (N, C) of a graph, given as in `EdgeConv`: (N, num_classes)."""
        if index is None and edge_index is None:
            raise ValueError("index: expected either index or edge_index, got none")
        features = self.features(x, index=index, edge_index=edge_index)
        return self.predict([features, self.fusion(features).amax(-1, keepdim=True)])
