"""The three scores of a batch of pairs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from paper_layers.big_bigan._named_tuples import exported

_TERMS = ("x", "z", "xz")


@exported
class Scores(NamedTuple):
    """Scores of shape (N,); None for terms the discriminator does not have.

    Attributes:
        x: Scores of images.
        z: Scores of latents.
        xz: Scores of pairs.
    """

    x: Tensor | None = None
    z: Tensor | None = None
    xz: Tensor | None = None

    @property
    def terms(self) -> dict[str, Tensor]:
        """Scores that are not None, by name."""
        return {name: score for name, score in zip(_TERMS, self, strict=True) if score is not None}

    def split(self, size: int) -> tuple[Scores, Scores]:
        """Return the scores of the first `size` pairs, and of the others."""
        parts = [(None, None) if score is None else (score[:size], score[size:]) for score in self]
        return Scores(*(part[0] for part in parts)), Scores(*(part[1] for part in parts))


def _ordered_terms(terms: Iterable[str]) -> tuple[str, ...]:
    """Check the names of the terms, and return them in the order of `Scores`."""
    given = tuple(terms)
    if unknown := [term for term in given if term not in _TERMS]:
        raise ValueError(f"terms: expected some of 'x', 'z', 'xz', got {unknown[0]!r}")
    if not {"x", "xz"} & set(given):
        raise ValueError(f"terms: expected 'x' or 'xz' among them, as only these score images, got {given!r}")
    return tuple(term for term in _TERMS if term in given)
