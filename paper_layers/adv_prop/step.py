"""The loss that AdvProp minimises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core import values
from paper_layers._core._torch_private import tree_map_only
from paper_layers.adv_prop.norm import SplitBatchNorm

# The usual weights of auxiliary losses: 0.4 for Inception v3's one, 0.3 for each of GoogLeNet's two.
_SHARES = {1: 0.4, 2: 0.3}

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
Criterion = Callable[[Any, Tensor], Tensor]


def adv_prop_loss(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, *, criterion: Criterion = F.cross_entropy
) -> Tensor:
    """The loss of a batch and that of its adversarial images, summed: one training step of AdvProp.

    For Xie, Tan, Gong, Wang, Yuille, Le, "Adversarial Examples Improve Image Recognition", CVPR 2020, section 4:
    L(x, y) + L(attack(x), y), both with the true labels. Both go through the model in one forward, where split norms
    send the first half through their main branch and the second through the auxiliary one. A mean over the joined batch
    would be half of it. With K steps of PGD a training step costs about K + 2 times a plain one.

    A model may return anything: every tensor is split, and the criterion gets the parts. Of named tuples with `logits`
    and auxiliary ones, as torchvision's Inception v3 and GoogLeNet return in training, it gets each logits: one
    auxiliary loss counts 0.4, each of two 0.3.

    Under autocast, with a GradScaler and with DistributedDataParallel it is used as any loss. For their joined
    statistics, split the norms of `nn.SyncBatchNorm.convert_sync_batchnorm(model)`.

    Args:
        model: In training mode, with norms split in two: see `paper_layers.swap.split_batch_norm`.
        x: Images (N, C, ...).
        y: Labels, as the criterion takes them; integers become int64.
        attack: ``attack(model, x, y)`` makes images like x, as `pgd` does.
        criterion: ``criterion(logits, y)`` of either half; of other outputs than logits, ``criterion(output, y)``.

    Returns:
        The sum of two losses.

    Raises:
        ValueError: The model is in evaluation mode, or has no split norm, or one that is not split in equal halves;
            the attack's images are not like x.

    Example:
        >>> import functools, torch
        >>> from torch import nn
        >>> from paper_layers import swap
        >>> from paper_layers.adv_prop import adv_prop_loss, pgd
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> model = swap.split_batch_norm(model)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> attack = functools.partial(pgd, eps=4, step_size=1, steps=5, bounds=(0, 1))
        >>> for x, y in [(torch.rand(4, 3, 8, 8), torch.tensor([3, 1, 4, 1]))]:
        ...     loss = adv_prop_loss(model, x, y, attack)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> _ = swap.plain_batch_norm(model).eval()  # The network as it was, for inference.
    """
    y = values.widened(y)
    norms = split_norms(model)
    for norm in norms:
        if (sizes := norm.sizes(2 * len(x))) != [len(x)] * 2:
            raise ValueError(f"model: expected norms that split {2 * len(x)} images in halves, got one for {sizes}")
    adversarial = attack(model, x, y)
    if adversarial.shape != x.shape or adversarial.dtype != x.dtype:
        got = f"{adversarial.dtype} of shape {tuple(adversarial.shape)}"
        raise ValueError(f"attack: expected images like x, {x.dtype} of shape {tuple(x.shape)}, got {got}")
    clean_logits, logits = split_output(model(torch.cat([x, adversarial])), [len(x)] * 2)
    return loss_of(clean_logits, y, criterion) + loss_of(logits, y, criterion)


def split_output(output: Any, sizes: list[int]) -> list[Any]:
    """Split every tensor that a model returns into those of parts of the batch."""

    def part(number: int) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.split(sizes)[number], output)

    return [part(number) for number in range(len(sizes))]


def loss_of(output: Any, y: Tensor, criterion: Criterion) -> Tensor:
    """The criterion of logits, and a share of that of auxiliary logits beside them, as torchvision's models have."""
    if not isinstance(output, tuple) or not hasattr(output, "logits"):
        return criterion(output, y)
    fields = output._asdict()  # type: ignore[attr-defined]
    auxiliary = [value for name, value in fields.items() if name.startswith("aux_logits") and value is not None]
    weight = _SHARES.get(len(auxiliary), 0.0)
    return criterion(output.logits, y) + weight * sum(criterion(logits, y) for logits in auxiliary)


def split_norms(model: nn.Module) -> list[SplitBatchNorm]:
    """Those that split batches in training."""
    norms = [module for module in model.modules() if isinstance(module, SplitBatchNorm)]
    if not norms:
        raise ValueError("model: expected split batch norms, as swap.split_batch_norm makes them, got none")
    training = [norm for norm in norms if norm.training]
    if not training:
        raise ValueError(
            "model: expected training mode, as evaluation sends all through the main norms, got evaluation"
        )
    return training
