"""LIP-ResNet: a residual network that downsamples by learned importance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paper_layers.lip._init import init_host
from paper_layers.lip._options import NetworkOptions
from paper_layers.lip.logit import BottleneckStem, LogitHead
from paper_layers.lip.pool import LIPPool2d

if TYPE_CHECKING:
    from typing_extensions import Unpack

_EXPANSION = 4


class _Block(nn.Module):
    """The layers and the init that both bottleneck blocks share. Modules are registered in the order of their run."""

    def __init__(
        self,
        in_channels: int,
        planes: int,
        kernel_size: int,
        *,
        stem: nn.Module | None = None,
        pool: nn.Module | None = None,
        shortcut_pool: nn.Module | None = None,
        **factory: Any,
    ):
        super().__init__()
        channels = planes * _EXPANSION
        if stem is not None:
            self.stem = stem
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(planes, **factory)
        if pool is not None:
            self.pool = pool
        self.conv2 = nn.Conv2d(planes, planes, kernel_size, padding=kernel_size // 2, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(planes, **factory)
        self.conv3 = nn.Conv2d(planes, channels, 1, bias=False, **factory)
        self.bn3 = nn.BatchNorm2d(channels, **factory)
        self.relu = nn.ReLU(inplace=True)
        if shortcut_pool is not None:
            self.shortcut_pool = shortcut_pool
        self.downsample: nn.Module | None = None
        if shortcut_pool is not None or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, bias=False, **factory), nn.BatchNorm2d(channels, **factory)
            )

    def reset_parameters(self) -> None:
        """Initialize afresh; the last batch norm starts at zero, so the block starts as its shortcut."""
        init_host(self, "fan_out")
        nn.init.zeros_(self.bn3.weight)


class Bottleneck(_Block):
    """ResNet's bottleneck block with stride 1.

    Args:
        in_channels: Channels of the input.
        planes: Channels of the 3x3 convolution; the output has four times as many.

    Example:
        >>> Bottleneck(64, 64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 256, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_channels, planes, 3, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, 4 * planes, H, W) for images (N, in_channels, H, W)."""
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.relu(self.bn2(self.conv2(output)))
        output = self.bn3(self.conv3(output))
        shortcut = input if self.downsample is None else self.downsample(input)
        return self.relu(output + shortcut)


class LIPBottleneck(_Block):
    """ResNet's bottleneck block with stride 2, both of its branches downsampled by LIP.

    Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019. The strided 3x3 convolution
    becomes LIP and a 1x1 convolution, the strided shortcut becomes LIP and its 1x1 convolution. Both logits come from
    one `BottleneckStem` on the block's input; each pool has its own `LogitHead`.

    Args:
        in_channels: Channels of the input.
        planes: Channels between the 1x1 convolutions; the output has four times as many.
        hidden_channels: Channels inside the logit module.
        zero_init: See `LIPPool2d`.

    Example:
        >>> LIPBottleneck(256, 128)(torch.randn(2, 256, 8, 8)).shape
        torch.Size([2, 512, 4, 4])
    """

    downsample: nn.Module

    def __init__(
        self,
        in_channels: int,
        planes: int,
        hidden_channels: int = 128,
        *,
        zero_init: str | None = "norm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def pool(channels: int) -> LIPPool2d:
            return LIPPool2d(channels, logit=LogitHead(hidden_channels, channels, zero_init=zero_init, **factory))

        stem = BottleneckStem(in_channels, hidden_channels, **factory)
        super().__init__(
            in_channels, planes, 1, stem=stem, pool=pool(planes), shortcut_pool=pool(in_channels), **factory
        )
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, 4 * planes, ceil(H / 2), ceil(W / 2)) for images (N, in_channels, H, W)."""
        features = self.stem(input)
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.relu(self.bn2(self.conv2(self.pool(output, features))))
        output = self.bn3(self.conv3(output))
        return self.relu(output + self.downsample(self.shortcut_pool(input, features)))


class LIPResNet(nn.Module):
    """A ResNet whose max pool and strided bottleneck blocks downsample by local importance-based pooling.

    Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019. Module names are those of
    torchvision's ResNet, except `pool` for its max pool and the additional names in `LIPBottleneck`.

    Args:
        layers: Number of blocks in each of the four stages.
        num_classes: Number of classes.
        hidden_channels: Channels inside the logit modules.
        zero_init: See `LIPPool2d`.

    Shape:
        Input (N, 3, H, W), output (N, num_classes).

    Example:
        >>> LIPResNet((1, 1, 1, 1), num_classes=10)(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        hidden_channels: int = 128,
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
            in_channels = planes // 2 * _EXPANSION
            return LIPBottleneck(in_channels, planes, hidden_channels, zero_init=zero_init, **factory)

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
            if isinstance(module, _Block):
                module.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Return class scores (N, num_classes) of images (N, 3, H, W)."""
        output = self.pool(self.relu(self.bn1(self.conv1(input))))
        output = self.layer4(self.layer3(self.layer2(self.layer1(output))))
        return self.fc(self.avgpool(output).flatten(1))


def lip_resnet50(**options: Unpack[NetworkOptions]) -> LIPResNet:
    """Return LIP-ResNet-50, 78.19 % top-1 on ImageNet in the paper's code (ResNet-50: 76.40 %). See `LIPResNet`.

    Example:
        >>> sum(p.numel() for p in lip_resnet50(device="meta").parameters())
        23864232
    """
    return LIPResNet((3, 4, 6, 3), **options)


def lip_resnet101(**options: Unpack[NetworkOptions]) -> LIPResNet:
    """Return LIP-ResNet-101, 79.33 % top-1 on ImageNet in the paper's code (ResNet-101: 77.98 %). See `LIPResNet`.

    Example:
        >>> sum(p.numel() for p in lip_resnet101(device="meta").parameters())
        42856360
    """
    return LIPResNet((3, 4, 23, 3), **options)
