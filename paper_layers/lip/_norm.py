"""The instance norm of LIP's logit modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_layers._core.fusing import known, readable
from paper_layers._core.tracing import Leaf


class InstanceNorm2d(Leaf, nn.InstanceNorm2d):
    """Affine instance norm that also takes maps of one pixel, empty batches, and an initial weight."""

    def __init__(
        self,
        num_features: int,
        initial_weight: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, affine=True, device=device, dtype=dtype)
        self.initial_weight = initial_weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to its initial value and the bias to zero."""
        super().reset_parameters()
        if hasattr(self, "initial_weight"):  # The parent's constructor calls this too.
            nn.init.constant_(self.weight, self.initial_weight)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize images (N, C, H, W) or (C, H, W); keep the memory format."""
        # Group norm with one group per channel gives the same numbers. F.instance_norm refuses one pixel and an empty
        # batch, F.group_norm refuses one pixel of one image. On CPU torch.group_norm computes the variance of
        # channels_last images as E[x^2] - E[x]^2, which is inaccurate: hence the copies.
        batch = input if input.dim() == 4 else input[None]
        output = torch.group_norm(batch.contiguous(), self.num_features, self.weight, self.bias, self.eps)
        if not batch.is_contiguous():
            output = torch.empty_like(batch, dtype=output.dtype).copy_(output)
        return output if input.dim() == 4 else output[0]

    def extra_repr(self) -> str:
        """Return channels, epsilon and initial weight, for the repr."""
        return f"{self.num_features}, eps={self.eps}, initial_weight={self.initial_weight}"


known(InstanceNorm2d)


def relu_of(norm: nn.Module, input: Tensor) -> Tensor:
    """Apply a norm and ReLU. ReLU is in place unless another layer replaces the norm or hooks may keep its output."""
    return F.relu(norm(input), inplace=readable(norm, InstanceNorm2d, nn.BatchNorm2d))
