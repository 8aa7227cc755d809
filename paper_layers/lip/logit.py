"""The logit modules of LIP: small networks that say how much each pixel matters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core.fusing import known, readable
from paper_layers._core.tracing import Leaf

BOUND = 12.0  # The gate keeps logits in (0, BOUND).


class InstanceNorm2d(Leaf, nn.InstanceNorm2d):
    """Affine instance norm that also takes maps of one pixel, empty batches, and a starting weight."""

    def __init__(
        self,
        num_features: int,
        initial_weight: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, affine=True, device=device, dtype=dtype)
        self.initial_weight = initial_weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight at its starting value, bias at zero."""
        super().reset_parameters()
        if hasattr(self, "initial_weight"):  # The parent's constructor calls this as well.
            nn.init.constant_(self.weight, self.initial_weight)

    def forward(self, input: Tensor) -> Tensor:
        """Images (N, C, H, W) or (C, H, W) to normalized ones in the same memory format."""
        # The same numbers as one group a channel. F.instance_norm refuses one pixel and an empty batch, F.group_norm
        # one pixel of one image. torch.group_norm loses the variance of channels_last images (on CPU, as
        # E[x^2] - E[x]^2), hence the copies.
        batch = input if input.dim() == 4 else input[None]
        output = torch.group_norm(batch.contiguous(), self.num_features, self.weight, self.bias, self.eps)
        if not batch.is_contiguous():
            output = torch.empty_like(batch, dtype=output.dtype).copy_(output)
        return output if input.dim() == 4 else output[0]

    def extra_repr(self) -> str:
        """Channels, epsilon and starting weight, for the repr."""
        return f"{self.num_features}, eps={self.eps}, initial_weight={self.initial_weight}"


known(InstanceNorm2d)


def relu_of(norm: nn.Module, input: Tensor) -> Tensor:
    """The positive part of a norm's output, in place unless another layer stands in or others may see the output."""
    return F.relu(norm(input), inplace=readable(norm, InstanceNorm2d, nn.BatchNorm2d))


class LogitHead(nn.Module):
    """Convolution, instance norm and gate: ``12 * sigmoid(norm(conv(x)))``, logits between 0 and 12.

    The last stage of every logit module. Alone it is the paper's projection (kernel size 1) or the
    official code's simplified form (kernel size 3).

    Args:
        in_channels: Channels that it sees.
        channels: Channels of the logits, those of the pooled image.
        kernel_size: 1 or 3, an odd number.
        zero_init: What starts at zero so that all logits are equal: "norm", "conv" or None (nothing).
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Example:
        >>> LogitHead(64, 32, kernel_size=3)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 1,
        zero_init: str | None = "norm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if zero_init not in ("norm", "conv", None):
            raise ValueError(f"zero_init: expected 'norm', 'conv' or None, got {zero_init!r}")
        self.zero_init = zero_init
        self.conv = nn.Conv2d(
            in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False, device=device, dtype=dtype
        )
        self.norm = InstanceNorm2d(channels, 0.0 if zero_init == "norm" else 1.0, device=device, dtype=dtype)
        self.reset_zeros()

    def reset_parameters(self) -> None:
        """Initialize afresh."""
        self.conv.reset_parameters()
        self.norm.reset_parameters()
        self.reset_zeros()

    def reset_zeros(self) -> None:
        """Restore the zeros of the start after a host's init went over all convolutions."""
        if self.zero_init == "norm":
            nn.init.zeros_(self.norm.weight)
            nn.init.zeros_(self.norm.bias)
        elif self.zero_init == "conv":
            nn.init.zeros_(self.conv.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, channels, H, W)."""
        return BOUND * torch.sigmoid(self.norm(self.conv(input)))

    def extra_repr(self) -> str:
        """What starts at zero, for the repr."""
        return f"zero_init={self.zero_init!r}"


class BottleneckStem(nn.Module):
    """The first two stages of the bottleneck logit: conv 1x1 and conv 3x3, each with instance norm and ReLU.

    Args:
        channels: Channels that it sees.
        width: Channels of both stages.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Example:
        >>> BottleneckStem(256, 128)(torch.randn(2, 256, 8, 8)).shape
        torch.Size([2, 128, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        width: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False, device=device, dtype=dtype)
        self.norm1 = InstanceNorm2d(width, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, device=device, dtype=dtype)
        self.norm2 = InstanceNorm2d(width, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Initialize afresh."""
        for module in (self.conv1, self.norm1, self.conv2, self.norm2):
            module.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Images (N, channels, H, W) to features (N, width, H, W)."""
        return relu_of(self.norm2, self.conv2(relu_of(self.norm1, self.conv1(input))))


class BottleneckLogit(nn.Module):
    """The paper's best logit module: `BottleneckStem`, then `LogitHead`.

    Args:
        channels: Channels of the pooled image.
        width: Channels between; the paper tries 64, 128 and 256.
        zero_init: See `LogitHead`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Example:
        >>> BottleneckLogit(256, 128)(torch.randn(2, 256, 8, 8)).shape
        torch.Size([2, 256, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        width: int = 128,
        zero_init: str | None = "norm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.stem = BottleneckStem(channels, width, device=device, dtype=dtype)
        self.head = LogitHead(width, channels, zero_init=zero_init, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Initialize afresh."""
        self.stem.reset_parameters()
        self.head.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Images to logits, both (N, channels, H, W)."""
        return self.head(self.stem(input))
