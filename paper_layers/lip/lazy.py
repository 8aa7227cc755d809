"""Local importance-based pooling that takes its number of channels from the first input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from paper_layers._core import checks
from paper_layers.lip._options import PoolOptions
from paper_layers.lip.pool import LIPPool2d

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LazyLIPPool2d(LazyModuleMixin, LIPPool2d):
    """A pool that takes `channels` from its first input, and then becomes a `LIPPool2d`.

    For Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019. The arguments are those of `LIPPool2d`,
    without `channels`. Like torch's lazy modules, it can be moved, saved, loaded and given to an optimizer before the
    first input.

    Example:
        >>> import torch
        >>> pool = LazyLIPPool2d(kernel_size=2, stride=2, padding=0)
        >>> pool(torch.randn(2, 48, 8, 8)).shape
        torch.Size([2, 48, 4, 4])
        >>> type(pool).__name__, pool.channels
        ('LIPPool2d', 48)
    """

    cls_to_become = LIPPool2d

    def __init__(
        self,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 2,
        padding: int | tuple[int, int] = 1,
        **options: Unpack[PoolOptions],
    ):
        super().__init__(1, kernel_size, stride, padding, **options)
        self.channels = 0
        if self.form == "custom":
            return
        factory: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        for module in self.logit.modules():
            for name, _ in list(module.named_parameters(recurse=False)):
                unknown: Any = UninitializedParameter(**factory)
                module.register_parameter(name, unknown)

    def has_uninitialized_params(self) -> bool:
        """Return True until `channels` is known."""
        return self.channels == 0

    def reset_parameters(self) -> None:
        """Initialize afresh, if `channels` is known."""
        if not self.has_uninitialized_params():
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor, logit_input: Tensor | None = None) -> None:
        """Take `channels` from the first input."""
        if not self.has_uninitialized_params():
            return
        checks.shape("input", input, ("N", "C", "H", "W"), ("C", "H", "W"))
        self._materialize(int(input.shape[-3]))  # While torch.jit traces, sizes are tensors.
        if self.form != "custom":
            self.reset_parameters()

    def _materialize(self, channels: int) -> None:
        if self.form != "custom":
            self._materialize_logit(channels)
        self.channels = channels

    def _materialize_logit(self, channels: int) -> None:
        built = LIPPool2d(
            channels, logit=self.form, hidden_channels=self.hidden_channels, zero_init=self.zero_init, device="meta"
        )
        shapes = {name: parameter.shape for name, parameter in built.named_parameters()}
        for name, parameter in self.named_parameters():
            if not is_lazy(parameter):
                raise RuntimeError(
                    f"{name}: expected a parameter without a shape before the first input, got one of shape "
                    f"{tuple(parameter.shape)}. Torch can't move lazy parameters to the meta device: build the "
                    "pool there, or after the first input"
                )
            parameter.materialize(shapes[name])
        for mine, theirs in zip(self.modules(), built.modules(), strict=True):
            for name in ("in_channels", "out_channels", "num_features"):
                if hasattr(theirs, name):
                    setattr(mine, name, getattr(theirs, name))

    # Torch's mixin handles only a module's own parameters. These methods handle its submodules' parameters too.

    def state_dict(self, *args: Any, keep_vars: bool = False, **kwargs: Any) -> Any:
        """Return the state dict; parameters without a shape are saved as uninitialized."""
        return super().state_dict(*args, keep_vars=keep_vars or self.has_uninitialized_params(), **kwargs)

    def _lazy_load_hook(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.form == "custom" or not self.has_uninitialized_params():
            return
        head = "logit.head." if self.form == "bottleneck" else "logit."
        for name, dim in ((f"{head}norm.weight", 0), (f"{head}conv.weight", 0), ("logit.stem.conv1.weight", 1)):
            weight = state_dict.get(prefix + name)
            if weight is not None and not is_lazy(weight):
                self._materialize(weight.shape[dim])
                self.reset_parameters()  # Some parameters may not be in the state dict.
                return
