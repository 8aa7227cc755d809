"""Options that several classes pass on to the layers they build."""

from __future__ import annotations

from typing import TypedDict


class MLPOptions(TypedDict, total=False):
    """Options of `ResidualMLP`, which documents them."""

    hidden_features: int
    depth: int
    activation: str
    spectral_norm: bool


class HeadOptions(MLPOptions, total=False):
    """Options of `UnaryHead`, which documents them."""

    projection_bias: bool
    projection_spectral_norm: bool
