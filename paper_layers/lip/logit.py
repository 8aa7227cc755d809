"""The logit modules of LIP: small networks that predict how much each pixel matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paper_layers.lip._norm import InstanceNorm2d, relu_of

_BOUND = 12.0  # The gate keeps logits in (0, _BOUND).


class LogitHead(nn.Module):
    """Convolution, instance norm and gate: ``12 * sigmoid(norm(conv(x)))``, logits between 0 and 12.

    The last stage of every logit module. Alone it is the paper's projection (kernel size 1) or the
    official code's simplified form (kernel size 3).

    Args:
        in_channels: Channels of the input.
        channels: Channels of the logits and of the pooled image.
        kernel_size: 1 or 3, an odd number.
        zero_init: Start with equal logits, by zeros in the "norm" or the "conv"; None: no zeros.

    Example:
        >>> LogitHead(64, 32, kernel_size=3)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 1,
        *,
        zero_init: str | None = "norm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if zero_init not in ("norm", "conv", None):
            raise ValueError(f"zero_init: expected 'norm', 'conv' or None, got {zero_init!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.zero_init = zero_init
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False, **factory)
        self.norm = InstanceNorm2d(channels, 0.0 if zero_init == "norm" else 1.0, **factory)
        self.reset_zeros()

    def reset_parameters(self) -> None:
        """Initialize afresh."""
        self.conv.reset_parameters()
        self.norm.reset_parameters()
        self.reset_zeros()

    def reset_zeros(self) -> None:
        """Set the zeros of `zero_init` again, after a host's init has overwritten them."""
        if self.zero_init == "norm":
            nn.init.zeros_(self.norm.weight)
            nn.init.zeros_(self.norm.bias)
        elif self.zero_init == "conv":
            nn.init.zeros_(self.conv.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits (N, channels, H, W) of images (N, in_channels, H, W)."""
        return _BOUND * torch.sigmoid(self.norm(self.conv(input)))

    def extra_repr(self) -> str:
        """Return the zero init, for the repr."""
        return f"zero_init={self.zero_init!r}"


class BottleneckStem(nn.Module):
    """The first two stages of the bottleneck logit: conv 1x1 and conv 3x3, each with instance norm and ReLU.

    Args:
        in_channels: Channels of the input.
        hidden_channels: Channels of both stages.

    Example:
        >>> BottleneckStem(256, 128)(torch.randn(2, 256, 8, 8)).shape
        torch.Size([2, 128, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_channels, hidden_channels, 1, bias=False, **factory)
        self.norm1 = InstanceNorm2d(hidden_channels, **factory)
        self.conv2 = nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1, bias=False, **factory)
        self.norm2 = InstanceNorm2d(hidden_channels, **factory)

    def reset_parameters(self) -> None:
        """Initialize afresh."""
        for module in (self.conv1, self.norm1, self.conv2, self.norm2):
            module.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Return features (N, hidden_channels, H, W) of images (N, in_channels, H, W)."""
        return relu_of(self.norm2, self.conv2(relu_of(self.norm1, self.conv1(input))))


class BottleneckLogit(nn.Module):
    """The paper's best logit module: `BottleneckStem`, then `LogitHead`.

    Args:
        channels: Channels of the pooled image.
        hidden_channels: Channels inside; the paper tries 64, 128 and 256.
        zero_init: See `LogitHead`.

    Example:
        >>> BottleneckLogit(256, 128)(torch.randn(2, 256, 8, 8)).shape
        torch.Size([2, 256, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int = 128,
        *,
        zero_init: str | None = "norm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = BottleneckStem(channels, hidden_channels, **factory)
        self.head = LogitHead(hidden_channels, channels, zero_init=zero_init, **factory)

    def reset_parameters(self) -> None:
        """Initialize afresh."""
        self.stem.reset_parameters()
        self.head.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Return logits of images, both (N, channels, H, W)."""
        return self.head(self.stem(input))
