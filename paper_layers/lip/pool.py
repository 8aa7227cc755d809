"""Local importance-based pooling as a module, with its logit module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core.tracing import Leaf, leaf
from paper_layers.lip.logit import BottleneckLogit, LogitHead
from paper_layers.ops.lip_pool2d import lip_pool2d

Logit = str | nn.Module | Callable[[Tensor], Tensor]
_KERNEL_SIZES = {"projection": 1, "simplified": 3}


class _Function(nn.Module):
    """Wrap a plain function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def _plain(name: str, size: int | tuple[int, int], minimum: int) -> int | tuple[int, int]:
    """Check a size. Return an int, or a pair of ints if a pair came."""
    height, width = checks.pair(name, size, minimum)
    return (height, width) if isinstance(size, tuple | list) and len(size) == 2 else height


def _make_logit(
    logit: Logit, channels: int, hidden_channels: int, *, zero_init: str | None, **factory: Any
) -> nn.Module:
    if isinstance(logit, nn.Module):
        return logit
    if not isinstance(logit, str):
        if not callable(logit):
            raise TypeError(f"logit: expected a string, a module or a function, got {type(logit).__name__}")
        return _Function(logit)
    if logit == "bottleneck":
        return BottleneckLogit(channels, hidden_channels, zero_init=zero_init, **factory)
    if logit in _KERNEL_SIZES:
        return LogitHead(channels, channels, _KERNEL_SIZES[logit], zero_init=zero_init, **factory)
    if logit == "identity":
        return nn.Identity()
    choices = ", ".join(map(repr, ("bottleneck", *_KERNEL_SIZES, "identity")))
    raise ValueError(f"logit: expected one of {choices}, a module or a function, got {logit!r}")


@leaf
def _check_channels(input: Tensor, channels: int) -> None:
    checks.shape("input", input, ("N", channels, "H", "W"), (channels, "H", "W"))


class LIPPool2d(Leaf):
    r"""Pool each window by importances that the network learns: local importance-based pooling.

    .. math:: O_o = \frac{\sum_{i \in \Omega_o} e^{G(X)_i} X_i}{\sum_{i \in \Omega_o} e^{G(X)_i}}

    Equation 1 of Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019, with importance :math:`e^G`.
    Use it in place of a max or average pool, or of a convolution's stride. A fresh module is average pooling
    (without the padding), unless `logit` is "identity" or your own. Logits are converted to the dtype of the input,
    which is also the output's, under autocast too. The class works as timm's `aa_layer`; for timm models that need a
    class, use a subclass for another form of `logit`, not a partial.

    Args:
        channels: Channels of the input.
        kernel_size: Size of the window, one number or (height, width).
        stride: Step of the window.
        padding: Padding on each side; it has weight zero.
        logit: The logit module :math:`G`, one of

            - "bottleneck": conv 1x1 to `hidden_channels`, conv 3x3, conv 1x1 back; the paper's best;
            - "projection": conv 1x1; the paper's small one;
            - "simplified": conv 3x3; the official code's for stems;
            - "identity": the input is its own logit: SoftPool (Stergiou et al., ICCV 2021);
            - a module or function from the input to logits of its shape, or to one channel that all share.

            In the first three every convolution has an instance norm, and the last one a gate, 12 sigmoid.
        hidden_channels: Channels inside "bottleneck".
        ceil_mode: Round the output size up instead of down.
        zero_init: The zeros that make a fresh module average pooling: "norm", the affine weight and bias of the last
            instance norm; "conv", the last convolution, as in the official code, whose first gradients are some hundred
            times larger; None, no zeros.

    Shape:
        Input (N, C, H, W) or (C, H, W), output (N, C, H_out, W_out) or (C, H_out, W_out), sizes as in `nn.AvgPool2d`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A size is too small; `logit` or `zero_init` is unknown; the input has another number of channels or
            dimensions.

    Example:
        >>> pool = LIPPool2d(64, kernel_size=3, stride=2, padding=1)
        >>> pool(torch.randn(2, 64, 56, 56)).shape
        torch.Size([2, 64, 28, 28])
        >>> pool.importance(torch.randn(2, 64, 56, 56)).shape
        torch.Size([2, 64, 56, 56])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 2,
        padding: int | tuple[int, int] = 1,
        *,
        logit: Logit = "bottleneck",
        hidden_channels: int = 128,
        ceil_mode: bool = False,
        zero_init: str | None = "norm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.channels, self.hidden_channels = checks.positive(channels=channels, hidden_channels=hidden_channels)
        self.kernel_size = _plain("kernel_size", kernel_size, 1)
        self.stride = _plain("stride", stride, 1)
        self.padding = _plain("padding", padding, 0)
        self.ceil_mode = ceil_mode
        self.zero_init = zero_init
        self.form = logit if isinstance(logit, str) else "custom"
        self.logit = _make_logit(
            logit, self.channels, self.hidden_channels, zero_init=zero_init, device=device, dtype=dtype
        )

    def reset_parameters(self) -> None:
        """Initialize the logit module afresh, if it has a `reset_parameters`."""
        reset = getattr(self.logit, "reset_parameters", None)
        if reset is not None:
            reset()

    def forward(self, input: Tensor, logit_input: Tensor | None = None) -> Tensor:
        """Pool `input`, with logits computed from `logit_input` (default: `input`)."""
        _check_channels(input, self.channels)
        logit = self.logit(input if logit_input is None else logit_input)
        return lip_pool2d(input, logit.to(input.dtype), self.kernel_size, self.stride, self.padding, self.ceil_mode)

    @torch.no_grad()
    def importance(self, input: Tensor) -> Tensor:
        """Return the importance map for pictures: ``exp(logit)``, scaled so that each map's maximum is 1.

        Args:
            input: The logit module's input: the `input` or `logit_input` of `forward`.

        Returns:
            Tensor of the logits' shape with values in [0, 1], finite for infinite logits too (NaN stays NaN).
        """
        logit = self.logit(input)
        limits = torch.finfo(logit.dtype)
        logit = logit.clamp(limits.min, limits.max)
        return torch.exp(logit - logit.amax((-2, -1), keepdim=True))

    def extra_repr(self) -> str:
        """Return all arguments, for the repr."""
        hidden = f", hidden_channels={self.hidden_channels}" if self.form == "bottleneck" else ""
        zeros = f", zero_init={self.zero_init!r}" if self.form not in ("identity", "custom") else ""
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"logit={self.form!r}{hidden}, ceil_mode={self.ceil_mode}{zeros}"
        )
