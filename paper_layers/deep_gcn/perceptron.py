"""One layer of a multi-layer perceptron, with its norm over the nodes of clouds."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core import checks
from paper_layers._core.fusing import known, readable
from paper_layers._core.tracing import Leaf
from paper_layers.deep_gcn._clouds import broadcast_to_rows, ptr_of
from paper_layers.deep_gcn._edge_norm import ActNorm, BatchNorm, Order, batch_norm, instance_norm, may_fuse

Act = Literal["relu", "leakyrelu", "prelu"]
Norm = Literal["batch", "instance"]


class LayerOptions(TypedDict, total=False):
    """Keyword arguments of `Perceptron` that convolutions, blocks and networks pass on to it.

    Attributes:
        act: Activation.
        norm: Norm.
        bias: Give the linear layer a bias.
        order: Order of activation and norm.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    act: Act | None
    norm: Norm | None
    bias: bool
    order: Order
    device: torch.device | str | None
    dtype: torch.dtype | None


class Perceptron(Leaf):
    """A linear layer with its activation and norm, on (..., in_channels).

    The building block of the graph convolutions and heads of Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep
    as CNNs?", ICCV 2019. As in the official code, weights start from He's normal distribution and biases from zero.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        act: "relu", "leakyrelu" (slope 0.2), "prelu" (one slope, 0.2 at first) or None.
        norm: "batch", "instance" (over each cloud, without parameters) or None.
        bias: Give the linear layer a bias.
        order: "act_norm", as in the dense official code and its checkpoints, or "norm_act".
        dropout: The probability that a channel is dropped, for all nodes of a cloud at once.

    Raises:
        ValueError: An option has an unknown value.

    Example:
        >>> import torch
        >>> from paper_layers.deep_gcn import Perceptron
        >>> Perceptron(64, 32)(torch.randn(2, 1024, 64)).shape
        torch.Size([2, 1024, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        act: Act | None = "relu",
        norm: Norm | None = "batch",
        bias: bool = True,
        order: Order = "act_norm",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        in_channels = checks.integer("in_channels", in_channels, 1)
        out_channels = checks.integer("out_channels", out_channels, 1)
        if act not in ("relu", "leakyrelu", "prelu", None):
            raise ValueError(f"act: expected relu, leakyrelu, prelu or None, got {act!r}")
        if norm not in ("batch", "instance", None):
            raise ValueError(f"norm: expected batch, instance or None, got {norm!r}")
        checks.choice("order", order, ("act_norm", "norm_act"))
        dropout = checks.probability("dropout", dropout)
        placement: dict[str, Any] = {"device": device, "dtype": dtype}
        self.order: Order = order
        self.dropout, self.instance = float(dropout), norm == "instance"
        self.linear = nn.Linear(in_channels, out_channels, bias, **placement)
        self.act: nn.Module | None = None
        if act == "relu":
            self.act = nn.ReLU()
        elif act == "leakyrelu":
            self.act = nn.LeakyReLU(0.2)
        elif act == "prelu":
            self.act = nn.PReLU(1, 0.2, **placement)
        self.norm: BatchNorm | None = nn.BatchNorm1d(out_channels, **placement) if norm == "batch" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again, as in the official code."""
        nn.init.kaiming_normal_(self.linear.weight)
        if self.linear.bias is not None:
            nn.init.zeros_(self.linear.bias)
        if self.norm is not None:
            self.norm.reset_parameters()
        if isinstance(self.act, nn.PReLU):
            nn.init.constant_(self.act.weight, self.act.init)

    def extra_repr(self) -> str:
        """Return the options that no submodule shows."""
        parts = [f"order={self.order!r}"] if self.norm is not None or self.instance else []
        parts += ["norm='instance'"] if self.instance else []
        parts += [f"dropout={self.dropout}"] if self.dropout else []
        return ", ".join(parts)

    def forward(self, x: Tensor, *, batch: Tensor | None = None, ptr: Tensor | None = None) -> Tensor:
        """Apply the layer to (B, N, C), or to (N, C) of one cloud or of the clouds of `batch` or `ptr`."""
        ptr = ptr_of(x, batch, ptr)
        if x.dim() > 2 and self.norm is not None and readable(self.linear, nn.Linear):
            return self.finish(self.linear(x.flatten(0, -2)), x, ptr)
        return self.dropout_channels(self.activate_and_normalize(self.linear(x), ptr), ptr)

    def finish(self, rows: Tensor, x: Tensor, ptr: Tensor | None = None) -> Tensor:
        """Apply what follows the linear layer to its output, a row for each row of x."""
        shape = (*x.shape[:-1], rows.shape[-1])
        if self.norm is None:  # An instance norm needs the clouds.
            rows = rows.view(shape)
        output = self.activate_and_normalize(rows, ptr)
        return self.dropout_channels(output if output.dim() == len(shape) else output.view(shape), ptr)

    def activate_and_normalize(self, z: Tensor, ptr: Tensor | None = None) -> Tensor:
        """Apply the activation and the norm, which follow the linear layer."""
        act = self.act or nn.Identity()
        rows = z if self.norm is None else z.flatten(0, -2)
        rows = act(self._normalize(rows, ptr)) if self.order == "norm_act" else self._normalize(act(rows), ptr)
        return rows if rows.dim() == z.dim() else rows.view(z.shape)

    def _normalize(self, rows: Tensor, ptr: Tensor | None) -> Tensor:
        if self.instance:
            return instance_norm(rows, ptr)
        return rows if self.norm is None else batch_norm(self.norm, rows)

    @property
    def act_norm(self) -> ActNorm:
        """The activation and norm that follow the linear layer."""
        return ActNorm(self.act, self.norm, self.order, self.instance)

    def dropout_channels(self, x: Tensor, ptr: Tensor | None = None) -> Tensor:
        """Drop channels of whole clouds in (B, N, C) or with `ptr`, and of each row in (N, C)."""
        if not self.training or self.dropout == 0:
            return x
        if x.dim() == 2 and ptr is None:
            return F.dropout(x, self.dropout)
        scale = F.dropout(x.new_ones(len(x) if ptr is None else len(ptr) - 1, x.shape[-1]), self.dropout)
        return x * broadcast_to_rows(scale, x, ptr)


known(Perceptron)


def may_split_linear(layer: nn.Module) -> TypeGuard[Perceptron]:
    """Return True where a convolution may compute the linear layer in parts and call activation and norm."""
    return readable(layer, Perceptron) and readable(cast(Perceptron, layer).linear, nn.Linear)


def may_fuse_edges(layer: nn.Module) -> TypeGuard[Perceptron]:
    """Return True where `edge_max` may replace a call of the perceptron for each edge."""
    return may_split_linear(layer) and may_fuse(layer.act, layer.norm)


def call_perceptron(layer: nn.Module, x: Tensor, ptr: Tensor | None) -> Tensor:
    """Call the perceptron, or the layer in its place, which does not take `ptr`."""
    return layer(x, ptr=ptr) if isinstance(layer, Perceptron) else layer(x)
