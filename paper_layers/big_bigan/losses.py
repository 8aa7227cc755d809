"""The losses of both players."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from paper_layers._core import checks
from paper_layers.big_bigan.scores import Scores

REDUCTIONS = ("sum", "mean")


def discriminator_loss(
    real: Scores, fake: Scores, *, reduction: str = "sum", weights: Mapping[str, float] | None = None
) -> Tensor:
    r"""Compute the discriminator's hinge loss from the scores of real pairs (x, E(x)) and fake pairs (G(z), z).

    .. math:: L = \sum_{t} E[\max(0, 1 - s_t)]_{\mathrm{real}} + E[\max(0, 1 + s_t)]_{\mathrm{fake}}

    From Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019.

    Args:
        real: The discriminator's scores of real pairs.
        fake: The discriminator's scores of fake pairs, with the same terms.
        reduction: "sum" over the terms, as in the paper, or "mean", as in the authors' notebook.
        weights: Factors of the terms, by name; default 1.

    Returns:
        A scalar in the dtype of the scores (float32 also under autocast).

    Raises:
        TypeError: A weight is not a number.
        ValueError: The terms differ; there are no terms or no pairs; `reduction` or a weight's term is unknown.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import Scores, discriminator_loss
        >>> real, fake = Scores(x=torch.tensor([2.0, 0.5])), Scores(x=torch.tensor([-3.0, 0.0]))
        >>> discriminator_loss(real, fake)
        tensor(0.7500)
    """
    return _combine(real, fake, lambda score, y: F.relu(1 - y * score), reduction, weights)


def encoder_generator_loss(
    real: Scores, fake: Scores, *, reduction: str = "sum", weights: Mapping[str, float] | None = None
) -> Tensor:
    r"""Compute the joint loss of encoder and generator, which lowers real pairs' scores and raises fake pairs' scores.

    .. math:: L = \sum_{t} E[s_t]_{\mathrm{real}} - E[s_t]_{\mathrm{fake}}

    From Donahue, Simonyan, "Large Scale Adversarial Representation Learning", NeurIPS 2019. It is linear, so
    it has no lower bound. The encoder gets no gradient from :math:`s_x` of real pairs, the generator none from
    :math:`s_z` of fake pairs. `discriminator_loss` documents the arguments.

    Example:
        >>> import torch
        >>> from paper_layers.big_bigan import Scores, encoder_generator_loss
        >>> real, fake = Scores(x=torch.tensor([2.0, 0.5])), Scores(x=torch.tensor([-3.0, 0.0]))
        >>> encoder_generator_loss(real, fake)
        tensor(2.7500)
    """
    return _combine(real, fake, lambda score, y: y * score, reduction, weights)


def _combine(
    real: Scores,
    fake: Scores,
    loss: Callable[[Tensor, int], Tensor],
    reduction: str,
    weights: Mapping[str, float] | None,
) -> Tensor:
    checks.choice("reduction", reduction, REDUCTIONS)
    terms, others = real.terms, fake.terms
    if not terms or terms.keys() != others.keys():
        raise ValueError(f"fake: expected scores of {[*terms] or 'some term'}, as real, got {[*others]}")
    if unknown := [term for term in weights or () if term not in terms]:
        raise ValueError(f"weights: expected some of {[*terms]}, got {unknown[0]!r}")
    total: Tensor | None = None
    for name, score in terms.items():
        if score.numel() == 0 or others[name].numel() == 0:
            raise ValueError(f"real, fake: expected at least one pair each, got scores of shape {tuple(score.shape)}")
        value = loss(score, 1).mean() + loss(others[name], -1).mean()
        if weights is not None and name in weights:
            value = value * checks.number(f"weights[{name!r}]", weights[name])
        total = value if total is None else total + value
    assert total is not None
    return total / len(terms) if reduction == "mean" else total
