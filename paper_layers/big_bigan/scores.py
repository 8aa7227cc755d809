"""The three scores of a batch of pairs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from paper_layers.big_bigan.named_tuples import exported

TERMS = ("x", "z", "xz")


@exported
class Scores(NamedTuple):
    """Scores (N,) of images, of latents and of both together; None for terms that the discriminator has not."""

    x: Tensor | None = None
    z: Tensor | None = None
    xz: Tensor | None = None

    @property
    def terms(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: score for name, score in zip(TERMS, self, strict=True) if score is not None}

    def split(self, size: int) -> tuple[Scores, Scores]:
        """The first `size` pairs, and the others."""
        parts = [(None, None) if score is None else (score[:size], score[size:]) for score in self]
        return Scores(*(part[0] for part in parts)), Scores(*(part[1] for part in parts))


def chosen_terms(terms: Iterable[str]) -> tuple[str, ...]:
    """The terms in their order; those without an image, and unknown ones, are errors."""
    given = tuple(terms)
    if unknown := [term for term in given if term not in TERMS]:
        raise ValueError(f"terms: expected some of 'x', 'z', 'xz', got {unknown[0]!r}")
    if not {"x", "xz"} & set(given):
        raise ValueError(f"terms: expected 'x' or 'xz' among them, as only these see images, got {given!r}")
    return tuple(term for term in TERMS if term in given)
