"""Coarse heads: one vector, or one small mask per class, for each box."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core.tracing import Leaf


class BoxHead(Leaf):
    """Predict a vector for each box from its 14x14 features.

    The light head of Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as Rendering", CVPR 2020, section
    4.1: a 1x1 convolution if there are more than `hidden_channels` channels, a 2x2 convolution with stride 2, and three
    linear layers.

    Args:
        in_channels: Channels of the features.
        out_features: Size of each box's vector.
        hidden_channels: Output channels of the convolutions.
        hidden_features: Size of the two hidden linear layers.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is less than 1, or the features have another shape.

    Example:
        >>> import torch
        >>> from paper_layers.point_rend import BoxHead
        >>> BoxHead(256, 1000)(torch.randn(3, 256, 14, 14)).shape
        torch.Size([3, 1000])
    """

    side = 7  # The map's side after the convolutions, half the features' side.

    def __init__(
        self,
        in_channels: int,
        out_features: int,
        *,
        hidden_channels: int = 256,
        hidden_features: int = 1024,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        in_channels, out_features, hidden_channels, hidden_features = checks.positive(
            in_channels=in_channels,
            out_features=out_features,
            hidden_channels=hidden_channels,
            hidden_features=hidden_features,
        )
        self.in_channels, self.out_features = in_channels, out_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = min(in_channels, hidden_channels)
        self.reduce_channels = nn.Conv2d(in_channels, width, 1, **factory) if in_channels > hidden_channels else None
        self.reduce_size = nn.Conv2d(width, hidden_channels, 2, stride=2, **factory)
        self.fc1 = nn.Linear(hidden_channels * self.side**2, hidden_features, **factory)
        self.fc2 = nn.Linear(hidden_features, hidden_features, **factory)
        self.prediction = nn.Linear(hidden_features, out_features, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the parameters as the official code does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=1)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.prediction.weight, std=0.001)

    def extra_repr(self) -> str:
        """Return the sizes that the layers do not show."""
        return f"{self.in_channels}, {self.out_features}"

    def forward(self, features: Tensor) -> Tensor:
        """Return vectors (R, out_features) for features (R, in_channels, 14, 14)."""
        checks.shape("features", features, ("R", self.in_channels, 2 * self.side, 2 * self.side))
        x = features if self.reduce_channels is None else F.relu(self.reduce_channels(features))
        x = F.relu(self.reduce_size(x)).flatten(1)
        return self.prediction(F.relu(self.fc2(F.relu(self.fc1(x)))))


class CoarseMaskHead(BoxHead):
    """Predict a 7x7 mask of each class for each box from its 14x14 features, with the layers of `BoxHead`.

    The coarse head of Kirillov, Wu, He, Girshick, "PointRend: Image Segmentation as Rendering", CVPR 2020, section 4.1.

    Args:
        in_channels: Channels of the features.
        num_classes: Classes K.
        hidden_channels: See `BoxHead`.
        hidden_features: See `BoxHead`.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is less than 1, or the features have another shape.

    Example:
        >>> import torch
        >>> from paper_layers.point_rend import CoarseMaskHead
        >>> CoarseMaskHead(256, 80)(torch.randn(3, 256, 14, 14)).shape
        torch.Size([3, 80, 7, 7])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        hidden_channels: int = 256,
        hidden_features: int = 1024,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        num_classes = checks.integer("num_classes", num_classes, 1)
        super().__init__(
            in_channels,
            num_classes * self.side**2,
            hidden_channels=hidden_channels,
            hidden_features=hidden_features,
            device=device,
            dtype=dtype,
        )
        self.num_classes = num_classes

    def extra_repr(self) -> str:
        """Return the sizes that the layers do not show."""
        return f"{self.in_channels}, {self.num_classes}"

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (R, num_classes, 7, 7) for features (R, in_channels, 14, 14)."""
        return super().forward(features).unflatten(1, (self.num_classes, self.side, self.side))
