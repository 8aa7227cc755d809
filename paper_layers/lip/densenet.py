"""LIP-DenseNet: a densely connected network that downsamples by learned importance."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers.lip._init import init_host
from paper_layers.lip._norm import relu_of
from paper_layers.lip._options import NetworkOptions
from paper_layers.lip.pool import LIPPool2d

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BOTTLENECK = 4  # The 1x1 convolution of a dense layer has this many times the growth rate's channels.


class DenseLayer(nn.Module):
    """One layer of a dense block: norm, ReLU, conv 1x1, norm, ReLU, conv 3x3 to `growth_rate` new channels."""

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_channels = _BOTTLENECK * growth_rate
        self.norm1 = nn.BatchNorm2d(in_channels, **factory)
        self.conv1 = nn.Conv2d(in_channels, hidden_channels, 1, bias=False, **factory)
        self.norm2 = nn.BatchNorm2d(hidden_channels, **factory)
        self.conv2 = nn.Conv2d(hidden_channels, growth_rate, 3, padding=1, bias=False, **factory)

    def reset_parameters(self) -> None:
        """Initialize afresh."""
        init_host(self, "fan_in")

    def forward(self, input: Tensor) -> Tensor:
        """Return new features (N, growth_rate, H, W) of images (N, in_channels, H, W)."""
        return self.conv2(relu_of(self.norm2, self.conv1(relu_of(self.norm1, input))))


class DenseBlock(nn.Sequential):
    """Dense layers: each gets the block's input and the outputs of all earlier layers."""

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for i in range(num_layers):
            layer = DenseLayer(in_channels + i * growth_rate, growth_rate, device=device, dtype=dtype)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, input: Tensor) -> Tensor:
        """Concatenate the images (N, in_channels, H, W) and all new features along the channels."""
        features = [input]
        for layer in self:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class LIPTransition(nn.Module):
    """DenseNet's transition with LIP in place of its average pool: norm, ReLU, conv 1x1, 2x2 pooling.

    Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        hidden_channels: Channels inside the logit module.
        zero_init: See `LIPPool2d`.

    Example:
        >>> LIPTransition(256, 128)(torch.randn(2, 256, 8, 8)).shape
        torch.Size([2, 128, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int = 128,
        *,
        zero_init: str | None = "norm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.BatchNorm2d(in_channels, **factory)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False, **factory)
        self.pool = LIPPool2d(out_channels, 2, 2, 0, hidden_channels=hidden_channels, zero_init=zero_init, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize afresh."""
        init_host(self, "fan_in")

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, out_channels, H // 2, W // 2) for images (N, in_channels, H, W)."""
        return self.pool(self.conv(relu_of(self.norm, input)))


class LIPDenseNet(nn.Module):
    """A DenseNet whose max pool and transitions downsample by local importance-based pooling.

    Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019. Module names are those of
    torchvision's DenseNet. A fresh network starts with average pooling; the official DenseNet does not: its
    logit modules keep the host's init, which is ``zero_init=None`` here.

    Args:
        block_config: Number of layers in each dense block; a transition follows all but the last.
        growth_rate: Channels that each layer adds.
        num_init_features: Channels of the first convolution.
        num_classes: Number of classes.
        hidden_channels: Channels inside the logit modules.
        zero_init: See `LIPPool2d`.

    Shape:
        Input (N, 3, H, W), output (N, num_classes).

    Example:
        >>> LIPDenseNet((2, 2), growth_rate=8, num_classes=10)(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        block_config: Sequence[int] = (6, 12, 24, 16),
        growth_rate: int = 32,
        num_init_features: int = 64,
        *,
        num_classes: int = 1000,
        hidden_channels: int = 128,
        zero_init: str | None = "norm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = num_init_features
        features: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False, **factory),
            norm0=nn.BatchNorm2d(channels, **factory),
            relu0=nn.ReLU(inplace=True),
            pool0=LIPPool2d(channels, logit="simplified", zero_init=zero_init, **factory),
        )
        for i, num_layers in enumerate(block_config, start=1):
            features[f"denseblock{i}"] = DenseBlock(num_layers, channels, growth_rate, **factory)
            channels += num_layers * growth_rate
            if i < len(block_config):
                features[f"transition{i}"] = LIPTransition(
                    channels, channels // 2, hidden_channels, zero_init=zero_init, **factory
                )
                channels //= 2
        features["norm5"] = nn.BatchNorm2d(channels, **factory)
        self.features = nn.Sequential(features)
        self.classifier = nn.Linear(channels, num_classes, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the whole network afresh."""
        init_host(self.features, "fan_in")
        self.classifier.reset_parameters()
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return class scores (N, num_classes) of images (N, 3, H, W)."""
        output = F.relu(self.features(input))
        return self.classifier(F.adaptive_avg_pool2d(output, 1).flatten(1))


def lip_densenet121(**options: Unpack[NetworkOptions]) -> LIPDenseNet:
    """Return LIP-DenseNet-121, 76.64 % top-1 on ImageNet in the paper's code (DenseNet-121: 75.62 %).

    See `LIPDenseNet`.

    Example:
        >>> sum(p.numel() for p in lip_densenet121(device="meta").parameters())
        8690920
    """
    return LIPDenseNet(**options)
