"""Initialization of the layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as add_spectral_norm


def init_orthogonal_(layer: nn.Linear | nn.Embedding, spectral_norm: bool) -> None:
    """Make the weight orthogonal and the bias zero, and restart the spectral norm; parameters stay the same objects."""
    if parametrize.is_parametrized(layer, "weight"):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    if not layer.weight.is_meta:
        wide = torch.promote_types(layer.weight.dtype, torch.float32)  # QR does not support half precision.
        with torch.no_grad():
            layer.weight.copy_(nn.init.orthogonal_(torch.empty_like(layer.weight, dtype=wide)))
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
    if spectral_norm:
        add_spectral_norm(layer)
