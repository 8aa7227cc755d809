"""A strided convolution that does its stride by LIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paper_layers._core.fusing import is_plain
from paper_layers._core.tracing import Leaf
from paper_layers.lip._stride_pool import stride_pool
from paper_layers.lip.pool import LIPPool2d, Logit


class LIPConv2d(Leaf):
    """A strided convolution that does its stride by LIP: the convolution at every pixel, then LIP pooling.

    The surgery of Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019; `LIPPool2d` has the equation. The
    window is the smallest odd number not below the stride, and its centres are where the strided convolution would be
    computed, so output sizes are those of `nn.Conv2d`. The state dict adds `pool.*` to the convolution's keys.

    The module has the attributes of an `nn.Conv2d` of stride 1 but is not one, since its output is not linear in its
    weight. Tools that fold a norm into a convolution skip it, or fail when they set the weight in evaluation mode. Fold
    first, then swap.

    Args:
        *args: See `nn.Conv2d`, as for the keyword arguments.
        logit: See `LIPPool2d`.
        hidden_channels: See `LIPPool2d`.

    Example:
        >>> import torch
        >>> LIPConv2d(16, 32, kernel_size=3, stride=2, padding=1)(torch.randn(2, 16, 28, 28)).shape
        torch.Size([2, 32, 14, 14])
    """

    pool: LIPPool2d
    weight: Tensor
    bias: Tensor | None

    def __init__(self, *args: Any, logit: Logit = "bottleneck", hidden_channels: int = 128, **kwargs: Any):
        super().__init__()
        conv = nn.Conv2d(*args, **kwargs)
        factory = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        self.__dict__.update(vars(conv))
        self.take_stride(stride_pool(conv, logit, hidden_channels, factory))

    def take_stride(self, pool: LIPPool2d) -> None:
        """Set the stride to 1, and let this pool do it."""
        self.pool = pool
        self.stride = (1, 1)

    def reset_parameters(self) -> None:
        """Initialize the convolution and the logit module afresh."""
        nn.Conv2d.reset_parameters(self)  # type: ignore[arg-type]
        self.pool.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Convolve at every pixel, then pool."""
        return self.pool(nn.Conv2d._conv_forward(self, input, self.weight, self.bias))  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse new values of weight or bias in evaluation mode: tools fold a norm into a convolution this way."""
        if (
            name in ("weight", "bias")
            and isinstance(value, nn.Parameter)
            and name in self._parameters
            and not self.training
            and _differ(value, self._parameters[name])
            and "_loading" not in vars(self)
        ):
            raise RuntimeError(
                f"{name}: expected to stay the same Parameter in evaluation mode, got one with other values. A norm "
                "cannot be folded into this convolution, since a pool is between them: fold first, then swap. "
                "To change or tie values, write them in place, or in training mode"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any) -> None:
        vars(self)["_loading"] = True
        try:
            super()._load_from_state_dict(*args)
        finally:
            del vars(self)["_loading"]

    def extra_repr(self) -> str:
        """Return the convolution's arguments, with the stride that the pool does, for the repr."""
        text = nn.Conv2d.extra_repr(self)  # type: ignore[arg-type]
        return text.replace(f"stride={self.stride}", f"stride={self.pool.stride}", 1)


def _differ(new: Tensor, old: Tensor | None) -> bool:
    """Return True if only the values differ. Conversions change the dtype or device; tying again changes nothing."""
    if new is old or not is_plain(new) or not is_plain(old):  # FSDP2 sets sharded and whole parameters in turn.
        return False
    if old is None:
        return True
    same_kind = (new.dtype, new.device, new.is_meta) == (old.dtype, old.device, False)
    return same_kind and not torch.equal(new, old)
