"""DeepGCN: a head, blocks, and a prediction from the outputs of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paper_layers._core import checks
from paper_layers._core.fusing import known, readable
from paper_layers._core.tracing import Leaf
from paper_layers.deep_gcn._clouds import broadcast_to_rows, global_pool, ptr_of
from paper_layers.deep_gcn.blocks import Conv, DenseGCNBlock, PlainGCNBlock, ResGCNBlock
from paper_layers.deep_gcn.perceptron import LayerOptions, Perceptron, call_perceptron, may_split_linear

if TYPE_CHECKING:
    from typing_extensions import Unpack

Block = Literal["res", "dense", "plain"]
Dilations = Sequence[int] | Callable[[int], int]


def _dilation_rates(dilations: Dilations | None, count: int, most: int | None) -> list[int]:
    if most is not None and most < 1:
        raise ValueError(f"max_dilation: expected at least 1, got {most}")
    if dilations is None:
        rates = list(range(1, count + 1))
    elif callable(dilations):
        rates = [dilations(i) for i in range(count)]
    else:
        rates = list(dilations)
    if len(rates) != count:
        raise ValueError(f"dilations: expected one for each of the {count} blocks after the head, got {len(rates)}")
    return [min(rate, most or rate) for rate in rates]


class Prediction(nn.Sequential):
    """Perceptrons, which take `ptr`, and dropout."""

    def forward(self, input: Tensor, ptr: Tensor | None = None) -> Tensor:
        """Run the layers one after the other on features (..., C), with clouds that start at `ptr`."""
        return run_layers(self, input, ptr)


known(Prediction)


def run_layers(layers: Iterable[nn.Module], x: Tensor, ptr: Tensor | None) -> Tensor:
    """Call layers one after the other; the layers of this package also take `ptr`."""
    for layer in layers:
        x = layer(x, ptr) if isinstance(layer, Prediction) else call_perceptron(layer, x, ptr)
    return x


class NetOptions(LayerOptions, total=False):
    """Keyword arguments of `DeepGCN` that its variants pass on to it."""

    channels: int
    blocks: int
    block: Block
    conv: Conv
    k: int
    growth: int | None
    dilations: Dilations | None
    max_dilation: int | None
    stochastic: bool
    stochastic_probability: float
    dropout: float
    checkpointing: bool


class DeepGCN(Leaf):
    r"""ResGCN, DenseGCN or PlainGCN that labels the points of clouds, as for S3DIS.

    .. math:: x_0 = \mathcal{F}_0(x), \quad x_{l+1} = \mathcal{F}_l(x_l) + x_l, \quad
              y = h([\max_i f(X)_i, X]), \; X = [x_0, \ldots, x_L]

    Figure 2 of Li, Müller, Thabet, Ghanem, "DeepGCNs: Can GCNs Go as Deep as CNNs?", ICCV 2019. Block i finds its
    neighbours among its own features with dilation 1 + i; the head among the first three channels, the coordinates.

    Args:
        in_channels: Channels of the input, coordinates first.
        num_classes: Channels of the output.
        channels: Channels of head and blocks.
        blocks: The number of blocks, the head included: 28 for ResGCN-28.
        block: "res", "dense" or "plain". Plain blocks have dilation 1 unless `dilations` is given, never stochastic.
        conv: "edge", "mr", "gin" or "sage".
        k: Neighbours of each point.
        growth: With "dense", the number of channels that each block appends; default `channels`.
        dilations: One dilation for each block after the head, or a function of the block's number from 0; default 1, 2,
            3, .... A cloud with fewer than ``k * dilation`` points has fewer neighbours.
        max_dilation: An upper limit for all dilations.
        stochastic: Sometimes take random neighbours in training, see `DilatedKNN`.
        stochastic_probability: The probability of random neighbours.
        dropout: The probability that a feature is dropped before the last layer.
        checkpointing: Keep only the inputs of the blocks, and recompute the convolutions in the backward pass.
        **options: act, norm, bias, order, device and dtype of `Perceptron`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value is out of range or unknown.

    Example:
        >>> import torch
        >>> from paper_layers.deep_gcn import DeepGCN
        >>> net = DeepGCN(9, 13, blocks=7)
        >>> net(torch.randn(2, 512, 9)).shape
        torch.Size([2, 512, 13])
    """

    # Options that differ for the head.
    _head_options: ClassVar[LayerOptions] = {}

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 64,
        blocks: int = 28,
        block: Block = "res",
        conv: Conv = "edge",
        k: int = 16,
        growth: int | None = None,
        dilations: Dilations | None = None,
        max_dilation: int | None = None,
        stochastic: bool = True,
        stochastic_probability: float = 0.2,
        dropout: float = 0.3,
        checkpointing: bool = False,
        **options: Unpack[LayerOptions],
    ):
        super().__init__()
        if block not in ("res", "dense", "plain"):
            raise ValueError(f"block: expected res, dense or plain, got {block!r}")
        in_channels, channels, blocks = checks.positive(in_channels=in_channels, channels=channels, blocks=blocks)
        if growth is not None and block != "dense":
            raise ValueError(f"growth: expected None with block={block!r}, got {growth}")
        if block == "plain":
            stochastic, dilations = False, dilations or (lambda i: 1)
        rates = _dilation_rates(dilations, blocks - 1, max_dilation)
        appended = (growth or channels) if block == "dense" else 0
        graph: dict[str, Any] = {"conv": conv, "k": k, "stochastic": stochastic, **options}
        graph["stochastic_probability"] = stochastic_probability
        self.in_channels, self.checkpointing = in_channels, checkpointing
        self.num_features = channels * blocks + appended * (blocks * (blocks - 1) // 2)
        self.head = PlainGCNBlock(in_channels, channels, **{**graph, **self._head_options})
        self.blocks = nn.ModuleList()
        for i, dilation in enumerate(rates):
            if block == "dense":
                made: PlainGCNBlock = DenseGCNBlock(
                    channels + appended * i, growth=appended, dilation=dilation, **graph
                )
            elif block == "res":
                made = ResGCNBlock(channels, dilation=dilation, **graph)
            else:
                made = PlainGCNBlock(channels, channels, dilation=dilation, **graph)
            self.blocks.append(made)
        self._add_prediction(num_classes, dropout, options)

    def _add_prediction(self, num_classes: int, dropout: float, options: LayerOptions) -> None:
        last: LayerOptions = {**options, "act": None, "norm": None}
        self.fusion = Perceptron(self.num_features, 1024, **options)
        self.prediction = Prediction(
            Perceptron(1024 + self.num_features, 512, **options),
            Perceptron(512, 256, **options),
            nn.Dropout(dropout),
            Perceptron(256, num_classes, **last),
        )

    def reset_parameters(self) -> None:
        """Initialise all parameters again, as in the official code."""
        for module in (self.head, *self.blocks, self.fusion, *self.prediction):
            if isinstance(module, PlainGCNBlock | Perceptron):
                module.reset_parameters()

    def forward(self, x: Tensor, batch: Tensor | None = None, ptr: Tensor | None = None) -> Tensor:
        """Label the points of (B, N, C), or of (N, C) with the clouds of `batch` or `ptr`: (..., num_classes)."""
        ptr = ptr_of(x, batch, ptr)
        features = self.features(x, ptr)
        pooled = global_pool(call_perceptron(self.fusion, features, ptr), ptr, "max")
        return self.predict([broadcast_to_rows(pooled, features, ptr), features], ptr)

    def features(
        self, x: Tensor, ptr: Tensor | None = None, *, index: Tensor | None = None, edge_index: Tensor | None = None
    ) -> Tensor:
        """Return the outputs of head and blocks, concatenated: (..., num_features). A static graph may be given."""
        checks.shape("x", x, ("N", self.in_channels), ("B", "N", self.in_channels))
        static = index is not None or edge_index is not None
        outputs = [x]
        for block in (self.head, *self.blocks):
            if not static:
                index = block.knn(x[..., :3] if block is self.head else outputs[-1], ptr=ptr)
            outputs.append(self._run_block(block, outputs[-1], index, edge_index, ptr))
        return torch.cat(outputs[1:], -1)

    def _run_block(
        self, block: nn.Module, x: Tensor, index: Tensor | None, edge_index: Tensor | None, ptr: Tensor | None
    ) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return block(x, index, edge_index=edge_index, ptr=ptr)

        if not self.checkpointing or not torch.is_grad_enabled():
            return run(x)
        return checkpoint(run, x, use_reentrant=False)

    def predict(self, parts: list[Tensor], ptr: Tensor | None = None) -> Tensor:
        """Predict from the concatenation of parts, of which some have one row for all points of a cloud."""
        layers = list(self.prediction) if readable(self.prediction, Prediction, nn.Sequential) else [self.prediction]
        if not may_split_linear(layers[0]):
            rows = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
            return run_layers(layers, torch.cat([part.expand(*rows, -1) for part in parts], -1), ptr)
        first: Any = layers[0]
        # The linear layer runs on each part, so a cloud's row is not copied to its points.
        weights = first.linear.weight.split([part.shape[-1] for part in parts], 1)
        terms = [F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)]
        z = sum(terms[1:], terms[0])
        if first.linear.bias is not None:
            z = z + first.linear.bias
        return run_layers(layers[1:], first.dropout_channels(first.activate_and_normalize(z, ptr), ptr), ptr)
