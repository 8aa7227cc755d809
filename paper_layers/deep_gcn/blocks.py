"""Blocks: a graph convolution on the nearest neighbours of its input, with or without a skip connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from paper_layers._core import checks
from paper_layers._core.tracing import Leaf
from paper_layers.deep_gcn._clouds import ptr_of
from paper_layers.deep_gcn.convs import CONVS
from paper_layers.deep_gcn.dilated_knn import DilatedKNN
from paper_layers.deep_gcn.perceptron import LayerOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

Conv = Literal["edge", "mr", "gin", "sage"]


class BlockOptions(LayerOptions, total=False):
    """Keyword arguments of `PlainGCNBlock` that other blocks pass on to it."""

    conv: Conv
    k: int
    dilation: int
    stochastic: bool
    stochastic_probability: float


class PlainGCNBlock(Leaf):
    r"""A graph convolution on the nearest neighbours of its input.

    .. math:: x_{l+1} = \mathcal{F}(x_l)

    The block of PlainGCN in Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as CNNs?", ICCV 2019.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        conv: "edge", "mr", "gin" or "sage".
        k: Neighbours of each point.
        dilation: The dilation of the neighbours.
        stochastic: Sometimes take random neighbours in training, see `DilatedKNN`.
        stochastic_probability: The probability of random neighbours.
        **options: act, norm, bias, order, device and dtype of `Perceptron`.

    Raises:
        ValueError: An option has an unknown value.

    Example:
        >>> import torch
        >>> from paper_layers.deep_gcn import PlainGCNBlock
        >>> PlainGCNBlock(9, 64, k=16)(torch.randn(2, 1024, 9)).shape
        torch.Size([2, 1024, 64])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        conv: Conv = "edge",
        k: int = 16,
        dilation: int = 1,
        stochastic: bool = False,
        stochastic_probability: float = 0.2,
        **options: Unpack[LayerOptions],
    ):
        super().__init__()
        checks.choice("conv", conv, CONVS)
        self.knn = DilatedKNN(k, dilation, stochastic=stochastic, stochastic_probability=stochastic_probability)
        self.conv: Any = CONVS[conv](in_channels, out_channels, **options)

    def reset_parameters(self) -> None:
        """Initialise all parameters again, as in the official code."""
        self.conv.reset_parameters()

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        *,
        edge_index: Tensor | None = None,
        batch: Tensor | None = None,
        ptr: Tensor | None = None,
    ) -> Tensor:
        """Apply the block to (B, N, C), or to (N, C) of one cloud or of the clouds of `batch` or `ptr`.

        `index` or `edge_index`, as in `EdgeConv`, gives a static graph in place of the nearest neighbours.
        """
        ptr = ptr_of(x, batch, ptr)
        if index is None and edge_index is None:
            index = self.knn(x, ptr=ptr)
        return self.combine(x, self.conv(x, index, edge_index=edge_index, ptr=ptr))

    def combine(self, x: Tensor, output: Tensor) -> Tensor:
        """Combine the block's input with the convolution's output."""
        return output


class ResGCNBlock(PlainGCNBlock):
    r"""A graph convolution whose output is added to its input.

    .. math:: x_{l+1} = \mathcal{F}(x_l) + x_l

    Equation 3 of Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as CNNs?", ICCV 2019.

    Args:
        channels: Channels of input and output.
        **options: All other options of `PlainGCNBlock`.

    Example:
        >>> import torch
        >>> from paper_layers.deep_gcn import ResGCNBlock
        >>> ResGCNBlock(64, k=16, dilation=4)(torch.randn(2, 1024, 64)).shape
        torch.Size([2, 1024, 64])
    """

    def __init__(self, channels: int, **options: Unpack[BlockOptions]):
        super().__init__(channels, channels, **options)

    def combine(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the input to the output."""
        return output + x


class DenseGCNBlock(PlainGCNBlock):
    r"""A graph convolution whose output is appended to its input.

    .. math:: x_{l+1} = [x_l, \mathcal{F}(x_l)]

    Equation 5 of Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as CNNs?", ICCV 2019.

    Args:
        in_channels: Channels of the input.
        growth: The number of appended channels.
        **options: All other options of `PlainGCNBlock`.

    Example:
        >>> import torch
        >>> from paper_layers.deep_gcn import DenseGCNBlock
        >>> DenseGCNBlock(64, growth=32, k=16)(torch.randn(2, 1024, 64)).shape
        torch.Size([2, 1024, 96])
    """

    def __init__(self, in_channels: int, *, growth: int = 64, **options: Unpack[BlockOptions]):
        super().__init__(in_channels, growth, **options)

    def combine(self, x: Tensor, output: Tensor) -> Tensor:
        """Append the output to the input."""
        return torch.cat([x, output], -1)
