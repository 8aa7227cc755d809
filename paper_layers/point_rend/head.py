"""The point head: a small perceptron that labels points from fine features and coarse logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core import checks, values
from paper_layers._core.fusing import known, readable
from paper_layers._core.tracing import Leaf
from paper_layers.point_rend._repr import options


def _project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer to the channels of (N, C, ...); in memory the result's channels come last."""
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


class PointRendHead(Leaf):
    r"""Label points from their fine features and coarse logits: PointRend's point head.

    .. math:: h_0 = x, \quad h_{l} = \mathrm{relu}(W_l [h_{l-1}, c] + b_l), \quad y = W [h_L, c] + b

    Section 3.3 of Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as Rendering", CVPR 2020, with fine
    features x and coarse logits c of each point. Nothing is concatenated: each layer multiplies h and c separately
    and adds the partial products. The partial products of x and c are linear in the maps, so they can be computed on
    whole maps and then sampled at the points, with `fine_shares`, `coarse_shares` and `finish`.

    Args:
        in_channels: Channels of the fine features, summed over maps.
        num_classes: Classes K, the channels of the coarse logits.
        hidden_features: Size of the hidden layers.
        num_fc: Number of hidden layers.
        coarse_pred_each_layer: If True, every layer takes c; if False, only the first (official semantic models).
        class_agnostic: If True, predict one logit for all classes.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is less than 1.

    Example:
        >>> import torch
        >>> from paper_layers.point_rend import PointRendHead
        >>> head = PointRendHead(256, 80)
        >>> fine, coarse = torch.randn(8, 256, 196), torch.randn(8, 80, 196)
        >>> head(fine, coarse).shape
        torch.Size([8, 80, 196])
        >>> head(fine, coarse, labels=torch.arange(8)).shape  # one class each, which is cheaper
        torch.Size([8, 1, 196])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        hidden_features: int = 256,
        num_fc: int = 3,
        coarse_pred_each_layer: bool = True,
        class_agnostic: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        in_channels, num_classes, hidden_features, num_fc = checks.positive(
            in_channels=in_channels, num_classes=num_classes, hidden_features=hidden_features, num_fc=num_fc
        )
        self.in_channels, self.num_classes = in_channels, num_classes
        self.hidden_features, self.num_fc = hidden_features, num_fc
        self.coarse_pred_each_layer, self.class_agnostic = coarse_pred_each_layer, class_agnostic
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        appended = num_classes if coarse_pred_each_layer else 0
        widths = [in_channels + num_classes] + [hidden_features + appended] * (num_fc - 1)
        self.layers = nn.ModuleList(nn.Linear(width, hidden_features, **factory) for width in widths)
        self.predictor = nn.Linear(hidden_features + appended, 1 if class_agnostic else num_classes, **factory)
        self.reset_parameters()

    @property
    def _layers(self) -> list[nn.Linear]:
        return [cast(nn.Linear, layer) for layer in self.layers]

    def reset_parameters(self) -> None:
        """Initialize the parameters as the official code does."""
        for layer in self._layers:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        for layer in (*self._layers, self.predictor):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def extra_repr(self) -> str:
        """Return all arguments."""
        shown = options(self, "hidden_features", "num_fc", "coarse_pred_each_layer", "class_agnostic")
        return f"{self.in_channels}, {self.num_classes}, {shown}"

    def forward(self, fine: Tensor, coarse: Tensor, labels: Tensor | None = None) -> Tensor:
        """Label the points.

        Args:
            fine: Features of shape (N, in_channels, P), as `paper_layers.point_sample` returns them, in
                either memory layout.
            coarse: Coarse logits of shape (N, num_classes, P).
            labels: The class to predict for each row, int64 of shape (N,); default all classes.

        Returns:
            Logits of shape (N, num_classes, P), or (N, 1, P) with `labels` or `class_agnostic`.
        """
        checks.shape("fine", fine, ("N", self.in_channels, "P"))
        checks.shape("coarse", coarse, (fine.shape[0], self.num_classes, fine.shape[2]))
        if labels is not None:
            labels = values.integers("labels", labels, fine.shape[0])
        if not self.splits:
            return self._call_layers(fine, coarse, labels)
        return self.finish(self._fine_shares([fine])[0], self.coarse_shares(coarse, labels), labels)

    @property
    def splits(self) -> bool:
        """Return whether `fine_shares`, `coarse_shares` and `finish` may read the layers' weights."""
        return all(readable(layer, nn.Linear) for layer in (*self.layers, self.predictor))

    def _call_layers(self, fine: Tensor, coarse: Tensor, labels: Tensor | None) -> Tensor:
        """Compute the formula layer by layer."""
        x, coarse = fine.mT, coarse.mT
        for i, layer in enumerate((*self.layers, self.predictor)):
            x = x if i == 0 else F.relu(x)
            x = layer(torch.cat([x, coarse], -1) if i == 0 or self.coarse_pred_each_layer else x)
        if labels is None or self.class_agnostic:
            return x.mT
        return x.gather(2, labels[:, None, None].expand(-1, x.shape[1], 1)).mT

    def fine_shares(self, fine: Sequence[Tensor]) -> list[Tensor]:
        """Return the first layer's partial product (N, hidden_features, ...) of each fine feature (N, C_l, ...).

        Raises:
            TypeError: A layer must be called; see `splits`.
        """
        if not self.splits:
            raise TypeError("layers: expected plain nn.Linear without hooks, got others; call the head instead")
        return self._fine_shares(fine)

    def _fine_shares(self, fine: Sequence[Tensor]) -> list[Tensor]:
        weights = self._layers[0].weight[:, : self.in_channels].split([level.shape[1] for level in fine], 1)
        return [_project(level, weight) for level, weight in zip(fine, weights, strict=True)]

    def coarse_shares(self, coarse: Tensor, labels: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the partial product of coarse logits (N, num_classes, ...) for each layer that takes them."""
        if not self.coarse_pred_each_layer:
            yield _project(coarse, self._layers[0].weight[:, self.in_channels :])
            return
        for layer in self._layers:
            yield _project(coarse, layer.weight[:, -self.num_classes :])
        weight = self._predictor(labels)[0][..., -self.num_classes :]
        if weight.dim() == 2:
            yield _project(coarse, weight)
        else:
            yield (weight @ coarse.flatten(2)).unflatten(2, coarse.shape[2:])

    def finish(self, fine: Tensor, coarse: Iterable[Tensor], labels: Tensor | None = None) -> Tensor:
        """Return the logits from the partial products (N, ..., P) at points.

        Each coarse product is taken from the iterator when its layer needs it, so only one is in memory.
        """
        shares = iter(coarse)
        first, *layers = self._layers
        x = fine.mT + next(shares).mT
        x = (x if first.bias is None else x.add_(first.bias)).relu_()
        for layer in layers:
            x = self._add(F.linear(x, layer.weight[:, : self.hidden_features], layer.bias), shares).relu_()
        weight, bias = self._predictor(labels)
        weight = weight[..., : self.hidden_features]
        if weight.dim() == 2:
            y = F.linear(x, weight, bias)
        else:
            y = x @ weight.mT if bias is None else x @ weight.mT + bias[:, None]
        return self._add(y, shares).mT

    def _add(self, x: Tensor, shares: Iterator[Tensor]) -> Tensor:
        return x.add_(next(shares).mT) if self.coarse_pred_each_layer else x

    def _predictor(self, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the last layer's weight (K, C) and bias (K,), or their rows (N, 1, C) and (N, 1) of the labels."""
        weight, bias = self.predictor.weight, self.predictor.bias
        if labels is None or self.class_agnostic:
            return weight, bias
        # Unlike indexing, `index_select` refuses a label of -1.
        row = weight.index_select(0, labels)[:, None]
        return row, None if bias is None else bias.index_select(0, labels)[:, None]


known(PointRendHead)
