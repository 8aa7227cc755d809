"""The strided convolution that does its stride by LIP."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from paper_layers._core.fusing import is_plain
from paper_layers._core.tracing import Leaf
from paper_layers.lip.pool import LIPPool2d, Logit

FOLDS = ("fuse", "reparameterize", "switch_to_deploy")  # Methods of blocks that fold their norms into convolutions.


class LIPConv2d(Leaf):
    """A strided convolution that does its stride by LIP: the convolution at every pixel, then LIP pooling.

    The surgery of Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019; `LIPPool2d` has the equation. Its
    window is the smallest odd number not below the stride and its centres lie where the strided convolution
    would have been computed, so output sizes are those of `nn.Conv2d`. The state dict adds `pool.*` to its keys.

    It has the attributes of an `nn.Conv2d` of stride 1 but is none, since the output is not linear in its weight: tools
    that fold a norm into a convolution leave it alone, or fail as they set the weight in evaluation mode. Fold first,
    and swap then.

    Args:
        *args: As in `nn.Conv2d`, and the keyword arguments as well.
        logit: As in `LIPPool2d`.
        bottleneck_width: As in `LIPPool2d`.

    Example:
        >>> import torch
        >>> LIPConv2d(16, 32, kernel_size=3, stride=2, padding=1)(torch.randn(2, 16, 28, 28)).shape
        torch.Size([2, 32, 14, 14])
    """

    pool: LIPPool2d
    weight: Tensor
    bias: Tensor | None

    def __init__(self, *args: Any, logit: Logit = "bottleneck", bottleneck_width: int = 128, **kwargs: Any):
        super().__init__()
        conv = nn.Conv2d(*args, **kwargs)
        place = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        self.__dict__.update(vars(conv))
        self.take_stride(stride_pool(conv, logit, bottleneck_width, place))

    def take_stride(self, pool: LIPPool2d) -> None:
        """Convolve at every pixel, and pool the result."""
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
        """Refuse new values of weight or bias in evaluation mode, which is how tools fold a norm into a convolution."""
        if (
            name in ("weight", "bias")
            and isinstance(value, nn.Parameter)
            and name in self._parameters
            and not self.training
            and _differ(value, self._parameters[name])
            and "_loading" not in vars(self)
        ):
            raise RuntimeError(
                f"{name}: expected to stay the same Parameter in evaluation mode, got one of other values. A norm "
                "cannot be folded into this convolution, since a pool comes between them: fold first, and swap then. "
                "To change values or to tie them to other ones, write them in place, or in training mode"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any) -> None:
        vars(self)["_loading"] = True
        try:
            super()._load_from_state_dict(*args)
        finally:
            del vars(self)["_loading"]

    def extra_repr(self) -> str:
        """All arguments of the convolution, for the repr."""
        return nn.Conv2d.extra_repr(self)  # type: ignore[arg-type]


def _differ(new: Tensor, old: Tensor | None) -> bool:
    """Return whether only the values are new: conversions change the type, and ties that are made again nothing."""
    if new is old or not is_plain(new) or not is_plain(old):  # FSDP2 sets sharded parameters and whole ones in turn.
        return False
    if old is None:
        return True
    same_kind = (new.dtype, new.device, new.is_meta) == (old.dtype, old.device, False)
    return same_kind and not torch.equal(new, old)


class Refusal:
    """Takes the place of a block's method that folds its convolutions."""

    def __init__(self, method: str, conv: str):
        self.method, self.conv = method, conv

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Refuse."""
        raise RuntimeError(
            f"{self.method}: expected plain convolutions, got the LIPConv2d {self.conv}, into which nothing can be "
            f"folded; call {self.method} first, and swap then"
        )


def own_logit(logit: Logit, place: dict[str, Any]) -> Logit:
    """Return the logit of one of several pools: of a module, a copy of its own."""
    return copy.deepcopy(logit).to(**place) if isinstance(logit, nn.Module) else logit


def stride_pool(conv: nn.Conv2d, logit: Logit, bottleneck_width: int, place: dict[str, Any]) -> LIPPool2d:
    """Return the pool that has the stride of a convolution."""
    rows, columns = conv.stride
    kernel_size = (rows | 1, columns | 1)
    padding = (rows // 2, columns // 2)  # Half the kernel, as rows | 1 is 2 * (rows // 2) + 1.
    pool = LIPPool2d(
        conv.out_channels, kernel_size, (rows, columns), padding, own_logit(logit, place), bottleneck_width, **place
    )
    return pool.train(conv.training)
