"""Split a model's output, and apply the criterion to each split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from paper_layers._core._torch_private import tree_map_only
from paper_layers.adv_prop.norm import SplitBatchNorm

# The usual weights of auxiliary losses: 0.4 for Inception v3's one, 0.3 for each of GoogLeNet's two.
_WEIGHTS = {1: 0.4, 2: 0.3}

Criterion = Callable[[Any, Tensor], Tensor]


def split_output(output: Any, sizes: list[int]) -> list[Any]:
    """Split every tensor of an output along the batch; return one output per split."""

    def one(split: int) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.split(sizes)[split], output)

    return [one(split) for split in range(len(sizes))]


def output_loss(output: Any, labels: Tensor, criterion: Criterion) -> Tensor:
    """Return the criterion of the logits, plus a share of the auxiliary logits' in torchvision's named tuples."""
    if not isinstance(output, tuple) or not hasattr(output, "logits"):
        return criterion(output, labels)
    fields = output._asdict()  # type: ignore[attr-defined]
    auxiliary = [value for name, value in fields.items() if name.startswith("aux_logits") and value is not None]
    weight = _WEIGHTS.get(len(auxiliary), 0.0)
    return criterion(output.logits, labels) + weight * sum(criterion(logits, labels) for logits in auxiliary)


def training_norms(model: nn.Module) -> list[SplitBatchNorm]:
    """Return the split batch norms that are in training mode."""
    norms = [module for module in model.modules() if isinstance(module, SplitBatchNorm)]
    if not norms:
        raise ValueError("model: expected split batch norms, as swap.split_batch_norm makes them, got none")
    training = [norm for norm in norms if norm.training]
    if not training:
        raise ValueError(
            "model: expected training mode, as evaluation runs the main norms on all images, got evaluation"
        )
    return training
