"""A layer of a multi-layer perceptron over nodes or over the edges of a graph."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers.ops.edge_conv import edge_conv

Act = Literal["relu", "leakyrelu", "prelu"]
Norm = Literal["batch", "instance"]
Order = Literal["act_norm", "norm_act"]


_frozen = threading.local()


@contextlib.contextmanager
def frozen_statistics() -> Iterator[None]:
    """While a forward pass is computed again for its backward, running statistics do not follow a second time."""
    _frozen.depth = getattr(_frozen, "depth", 0) + 1
    try:
        yield
    finally:
        _frozen.depth -= 1


class BatchNorm(nn.BatchNorm1d):
    """Batch norm with torch's parameters and buffers, whose statistics are computed elsewhere."""

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the statistics of the batch are needed."""
        return self.training or self.running_mean is None

    def scale_and_shift(self, mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """What normalises: factor and summand of each channel. In training the running statistics follow."""
        if not self.uses_batch_statistics:
            assert self.running_mean is not None
            assert self.running_var is not None
            mean, var = self.running_mean, self.running_var
        elif self.running_mean is not None and not getattr(_frozen, "depth", 0):
            self._follow(mean.detach(), var.detach(), count)
        scale = (var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
            return scale, self.bias - mean * scale
        return scale, -mean * scale

    def _follow(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            unbiased = var * (count / (count - 1).clamp(min=1))
            for running, now in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.add_((now - running) * rate)


class Perceptron(nn.Module):
    """A linear layer with its activation and norm, on (..., in_channels).

    The layer that the graph convolutions and heads of Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as
    CNNs?", ICCV 2019, are made of. Weights start as in the official code: He's normal distribution, biases at zero.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        act: "relu", "leakyrelu" (slope 0.2), "prelu" (one slope, 0.2 at first) or None.
        norm: "batch", "instance" (over the nodes or edges of each cloud, without parameters) or None.
        bias: Whether the linear layer has one.
        order: "act_norm", as the dense official code and its checkpoints have it, or "norm_act".
        dropout: The probability that a channel is dropped, for all nodes of a cloud in (B, N, C).
        device: Where the parameters are.
        dtype: Their dtype.

    Raises:
        ValueError: An argument is not one of those above.

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
        act: Act | None = "relu",
        norm: Norm | None = "batch",
        bias: bool = True,
        order: Order = "act_norm",
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value, least in (("in_channels", in_channels, 1), ("out_channels", out_channels, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if act not in ("relu", "leakyrelu", "prelu", None):
            raise ValueError(f"act: expected relu, leakyrelu, prelu or None, got {act!r}")
        if norm not in ("batch", "instance", None):
            raise ValueError(f"norm: expected batch, instance or None, got {norm!r}")
        if order not in ("act_norm", "norm_act"):
            raise ValueError(f"order: expected act_norm or norm_act, got {order!r}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability, got {dropout}")
        placement: dict[str, Any] = {"device": device, "dtype": dtype}
        self.order, self.dropout, self.instance = order, float(dropout), norm == "instance"
        self.linear = nn.Linear(in_channels, out_channels, bias, **placement)
        self.act: nn.Module | None = None
        if act == "relu":
            self.act = nn.ReLU()
        elif act == "leakyrelu":
            self.act = nn.LeakyReLU(0.2)
        elif act == "prelu":
            self.act = nn.PReLU(1, 0.2, **placement)
        self.norm = BatchNorm(out_channels, **placement) if norm == "batch" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again, as in the official code."""
        nn.init.kaiming_normal_(self.linear.weight)
        if self.linear.bias is not None:
            nn.init.zeros_(self.linear.bias)
        if self.norm is not None:
            self.norm.reset_parameters()
        if isinstance(self.act, nn.PReLU):
            nn.init.constant_(self.act.weight, self.act.init)

    def extra_repr(self) -> str:
        """What no submodule shows."""
        parts = [f"order={self.order!r}"] if self.norm is not None or self.instance else []
        parts += ["norm='instance'"] if self.instance else []
        parts += [f"dropout={self.dropout}"] if self.dropout else []
        return ", ".join(parts)

    def forward(self, x: Tensor, ptr: Tensor | None = None) -> Tensor:
        """Apply the layer to (B, N, C), or (N, C) of one cloud or of those that start at `ptr`."""
        return self.drop(self.activate_and_normalize(self.linear(x), ptr), ptr)

    def activate_and_normalize(self, z: Tensor, ptr: Tensor | None = None) -> Tensor:
        """All that follows the linear layer, without dropout."""
        if self.norm is None and not self.instance:
            return z if self.act is None else self.act(z)
        # Every row is a node with one edge, to a neighbour that is zero.
        rows = z if self.instance else z.flatten(0, -2)
        index = torch.zeros((1,) * rows.dim(), dtype=torch.int64, device=z.device).expand(*rows.shape[:-1], 1)
        zero = z.new_zeros(*rows.shape[:-2], 1, z.shape[-1])
        return self._normalized_together(rows, zero, index, ptr).view(z.shape)

    def max_over_edges(self, center: Tensor, neighbor: Tensor, index: Tensor, ptr: Tensor | None = None) -> Tensor:
        """Activate and normalise the edges ``center[i] + neighbor[j]``: the largest of each node, 0 for none."""
        output = self._normalized_together(center, neighbor, index, ptr)
        return output.where((index >= 0).any(-1, keepdim=True), 0)

    def _normalized_together(self, center: Tensor, neighbor: Tensor, index: Tensor, ptr: Tensor | None) -> Tensor:
        """The largest edges, normalised with all others, or cloud by cloud with instance norm."""
        if not self.instance or (center.dim() == 2 and ptr is None):
            return self._max_over_edges(center, neighbor, index)
        if center.dim() == 3:
            clouds = [self._max_over_edges(*cloud) for cloud in zip(center, neighbor, index, strict=True)]
            return torch.stack(clouds) if clouds else center
        assert ptr is not None
        bounds = ptr.tolist()
        rows = [slice(first, last) for first, last in itertools.pairwise(bounds) if first < last]
        return torch.cat([center[:0], *(self._max_over_edges(center[r], neighbor, index[r]) for r in rows)])

    def _max_over_edges(self, center: Tensor, neighbor: Tensor, index: Tensor) -> Tensor:
        """One set of edges."""
        act_first = self.order == "act_norm"
        slope = self._slope() if act_first else 1.0
        # A negative factor of the norm makes the smallest edge the largest.
        smallest = self.norm.weight < 0 if self.norm is not None and self.norm.affine else None
        wanted = self.instance or (self.norm is not None and self.norm.uses_batch_statistics)
        if wanted and index.numel() == 1:
            raise ValueError("input: expected more than one value to normalise each channel with, got 1")
        kept, mean, var = edge_conv(center, neighbor, index, negative_slope=slope, smallest=smallest, statistics=wanted)
        if self.instance:
            scale = (var + 1e-5).rsqrt()
            shift = -mean * scale
        elif self.norm is not None:
            scale, shift = self.norm.scale_and_shift(mean, var, (index >= 0).sum())
        else:
            return kept if act_first or self.act is None else self.act(kept)
        output = _affine(kept, scale, shift)
        if act_first or self.act is None:
            return output
        output = self.act(output)
        if isinstance(self.act, nn.PReLU):
            # Falling below zero where its slope is negative: then either end may be the largest.
            opposite = torch.ones_like(scale, dtype=torch.bool) if smallest is None else ~smallest
            other, _, _ = edge_conv(center, neighbor, index, negative_slope=1.0, smallest=opposite, statistics=False)
            output = torch.maximum(output, self.act(_affine(other, scale, shift)))
        return output

    def _slope(self) -> float | Tensor:
        """The factor of the activation below zero."""
        if isinstance(self.act, nn.PReLU):
            return self.act.weight
        if self.act is None:
            return 1.0
        return self.act.negative_slope if isinstance(self.act, nn.LeakyReLU) else 0.0

    def drop(self, x: Tensor, ptr: Tensor | None = None) -> Tensor:
        """Drop channels: of each row, but of whole clouds in (B, N, C) and where `ptr` says where they start."""
        if not self.training or self.dropout == 0:
            return x
        if x.dim() == 3:
            return x * F.dropout(torch.ones_like(x[:, :1]), self.dropout)
        if ptr is None:
            return F.dropout(x, self.dropout)
        kept = F.dropout(x.new_ones(len(ptr) - 1, x.shape[1]), self.dropout)
        return x * kept.repeat_interleave(ptr.diff(), 0, output_size=len(x))


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)
