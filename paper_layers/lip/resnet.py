"""LIP-ResNet: a residual network that downsamples by learned importance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paper_layers.lip._host import init_host
from paper_layers.lip.logit import BottleneckStem, LogitHead
from paper_layers.lip.pool import LIPPool2d

_EXPANSION = 4


class Bottleneck(nn.Module):
    """ResNet's bottleneck block with stride 1.

    Args:
        in_channels: Channels of the input.
        planes: Channels of the 3x3 convolution; the output has four times as many.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Example:
        >>> Bottleneck(64, 64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 256, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = planes * _EXPANSION
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(planes, **factory)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(planes, **factory)
        self.conv3 = nn.Conv2d(planes, channels, 1, bias=False, **factory)
        self.bn3 = nn.BatchNorm2d(channels, **factory)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, bias=False, **factory), nn.BatchNorm2d(channels, **factory)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize afresh; the last batch norm starts at zero, so the block at its shortcut."""
        init_host(self, "fan_out")
        nn.init.zeros_(self.bn3.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to (N, 4 * planes, H, W)."""
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.relu(self.bn2(self.conv2(output)))
        output = self.bn3(self.conv3(output))
        shortcut = input if self.downsample is None else self.downsample(input)
        return self.relu(output + shortcut)


class LIPBottleneck(nn.Module):
    """ResNet's bottleneck block with stride 2, both of its branches downsampled by LIP.

    Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019. The strided 3x3 convolution
    becomes LIP and a 1x1 convolution, the strided shortcut LIP and its 1x1 convolution. Both logits come from
    one `BottleneckStem`, which sees the block's input; each pooling has its own last stage.

    Args:
        in_channels: Channels of the input.
        planes: Channels between the 1x1 convolutions; the output has four times as many.
        bottleneck_width: Channels inside the logit module.
        zero_init: See `LIPPool2d`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Example:
        >>> LIPBottleneck(256, 128)(torch.randn(2, 256, 8, 8)).shape
        torch.Size([2, 512, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        bottleneck_width: int = 128,
        zero_init: str | None = "norm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = planes * _EXPANSION

        def pool(width: int) -> LIPPool2d:
            return LIPPool2d(width, logit=LogitHead(bottleneck_width, width, zero_init=zero_init, **factory))

        self.stem = BottleneckStem(in_channels, bottleneck_width, **factory)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(planes, **factory)
        self.pool = pool(planes)
        self.conv2 = nn.Conv2d(planes, planes, 1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(planes, **factory)
        self.conv3 = nn.Conv2d(planes, channels, 1, bias=False, **factory)
        self.bn3 = nn.BatchNorm2d(channels, **factory)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut_pool = pool(in_channels)
        self.downsample = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, bias=False, **factory), nn.BatchNorm2d(channels, **factory)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize afresh; the last batch norm starts at zero, so the block at its shortcut."""
        init_host(self, "fan_out")
        nn.init.zeros_(self.bn3.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to (N, 4 * planes, ceil(H / 2), ceil(W / 2))."""
        source = self.stem(input)
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.relu(self.bn2(self.conv2(self.pool(output, source))))
        output = self.bn3(self.conv3(output))
        shortcut = self.downsample(self.shortcut_pool(input, source))
        return self.relu(output + shortcut)


class LIPResNet(nn.Module):
    """A ResNet whose max pool and strided bottleneck blocks downsample by local importance-based pooling.

    Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019. Module names are those of
    torchvision's ResNet, except `pool` for its max pool and what `LIPBottleneck` adds.

    Args:
        layers: Number of blocks in each of the four stages.
        num_classes: Number of classes.
        bottleneck_width: Channels inside the logit modules.
        zero_init: See `LIPPool2d`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shapes:
        Input (N, 3, H, W), output (N, num_classes).

    Example:
        >>> LIPResNet((1, 1, 1, 1), num_classes=10)(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        bottleneck_width: int = 128,
        zero_init: str | None = "norm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if len(layers) != 4:
            raise ValueError(f"layers: expected four numbers of blocks, got {layers!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(64, **factory)
        self.relu = nn.ReLU(inplace=True)
        self.pool = LIPPool2d(64, logit="simplified", zero_init=zero_init, **factory)

        def stage(first: nn.Module, planes: int, blocks: int) -> nn.Sequential:
            rest = (Bottleneck(planes * _EXPANSION, planes, **factory) for _ in range(blocks - 1))
            return nn.Sequential(first, *rest)

        def strided(planes: int) -> LIPBottleneck:
            return LIPBottleneck(planes // 2 * _EXPANSION, planes, bottleneck_width, zero_init, **factory)

        self.layer1 = stage(Bottleneck(64, 64, **factory), 64, layers[0])
        self.layer2 = stage(strided(128), 128, layers[1])
        self.layer3 = stage(strided(256), 256, layers[2])
        self.layer4 = stage(strided(512), 512, layers[3])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * _EXPANSION, num_classes, **factory)
        self._init_ends()  # The blocks have initialized themselves.

    def _init_ends(self) -> None:
        for module in (self.conv1, self.bn1, self.pool):
            init_host(module, "fan_out")
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def reset_parameters(self) -> None:
        """Initialize the whole network afresh."""
        self._init_ends()
        for module in self.modules():
            if isinstance(module, Bottleneck | LIPBottleneck):
                module.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Images (N, 3, H, W) to class scores (N, num_classes)."""
        output = self.pool(self.relu(self.bn1(self.conv1(input))))
        output = self.layer4(self.layer3(self.layer2(self.layer1(output))))
        return self.fc(self.avgpool(output).flatten(1))


def lip_resnet50(
    num_classes: int = 1000,
    bottleneck_width: int = 128,
    zero_init: str | None = "norm",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LIPResNet:
    """LIP-ResNet-50, 78.19 % top-1 on ImageNet in the paper's code (ResNet-50: 76.40 %). See `LIPResNet`.

    Example:
        >>> sum(p.numel() for p in lip_resnet50(device="meta").parameters())
        23864232
    """
    return LIPResNet((3, 4, 6, 3), num_classes, bottleneck_width, zero_init, device, dtype)


def lip_resnet101(
    num_classes: int = 1000,
    bottleneck_width: int = 128,
    zero_init: str | None = "norm",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LIPResNet:
    """LIP-ResNet-101, 79.33 % top-1 on ImageNet in the paper's code (ResNet-101: 77.98 %). See `LIPResNet`.

    Example:
        >>> sum(p.numel() for p in lip_resnet101(device="meta").parameters())
        42856360
    """
    return LIPResNet((3, 4, 23, 3), num_classes, bottleneck_width, zero_init, device, dtype)
