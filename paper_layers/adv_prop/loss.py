"""The loss that AdvProp minimizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core import values
from paper_layers.adv_prop._outputs import Criterion, output_loss, split_output, training_norms


def adv_prop_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
    *,
    criterion: Criterion = F.cross_entropy,
) -> Tensor:
    """Return the loss of a batch plus the loss of its adversarial images.

    For Xie, Tan, Gong, Wang, Yuille, Le, "Adversarial Examples Improve Image Recognition", CVPR 2020, section 4:
    L(images, labels) + L(attack(images), labels). One forward takes both: split norms normalize the first half by their
    main norm and the second half by the auxiliary norm. A mean over the joined batch would be half of this sum. With K
    steps of PGD a training step costs about K + 2 plain steps.

    Every tensor that the model returns is split in two, and the criterion gets each half. If the model returns a named
    tuple with auxiliary logits, as torchvision's Inception v3 and GoogLeNet do in training, the criterion gets each
    logits, and the auxiliary losses weigh 0.4 (one) or 0.3 (each of two).

    The loss works under autocast, with a GradScaler and with DistributedDataParallel. To compute statistics over all
    processes, split the norms of `nn.SyncBatchNorm.convert_sync_batchnorm(model)`.

    Args:
        model: In training mode, with norms split in two: see `paper_layers.swap.split_batch_norm`.
        images: Images (N, C, ...).
        labels: Labels for the criterion; integers become int64.
        attack: ``attack(model, images, labels)`` returns images of the same shape and dtype, as `pgd` does.
        criterion: ``criterion(logits, labels)`` of each half; ``criterion(output, labels)`` if the model does not
            return logits.

    Returns:
        The sum of the two losses.

    Raises:
        ValueError: The model is in evaluation mode, or its norms are not split in equal halves; the attack's images
            have another shape or dtype.

    Example:
        >>> import functools, torch
        >>> from torch import nn
        >>> from paper_layers import swap
        >>> from paper_layers.adv_prop import adv_prop_loss, pgd
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> model = swap.split_batch_norm(model)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> attack = functools.partial(pgd, radius=4, step_size=1, steps=5, bounds=(0, 1))
        >>> for images, labels in [(torch.rand(4, 3, 8, 8), torch.tensor([3, 1, 4, 1]))]:
        ...     loss = adv_prop_loss(model, images, labels, attack)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> _ = swap.plain_batch_norm(model).eval()  # The network as it was, for inference.
    """
    labels = values.widened(labels)
    count = len(images)
    for norm in training_norms(model):
        if (sizes := norm.sizes(2 * count)) != [count] * 2:
            raise ValueError(f"model: expected norms that split {2 * count} images in halves, got one for {sizes}")
    adversarial = attack(model, images, labels)
    if adversarial.shape != images.shape or adversarial.dtype != images.dtype:
        expected, got = (f"{t.dtype} of shape {tuple(t.shape)}" for t in (images, adversarial))
        raise ValueError(f"attack: expected images like the clean ones, {expected}, got {got}")
    clean, attacked = split_output(model(torch.cat([images, adversarial])), [count] * 2)
    return output_loss(clean, labels, criterion) + output_loss(attacked, labels, criterion)
