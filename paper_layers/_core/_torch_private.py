"""Names of torch's that are not public, in one place: a new torch can break them only here."""

from __future__ import annotations

from typing import Any

import torch
from torch._decomp import register_decomposition
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.conv import _ConvNd as Conv
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
from torch.nn.modules.pooling import _AvgPoolNd as AvgPool
from torch.nn.modules.pooling import _MaxPoolNd as MaxPool
from torch.nn.utils.parametrizations import _SpectralNorm as SpectralNorm
from torch.utils._pytree import _register_namedtuple as register_namedtuple
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import _CheckpointFrame as CheckpointFrame

__all__ = [
    "AvgPool",
    "BatchNorm",
    "CheckpointFrame",
    "Conv",
    "FakeTensor",
    "FunctionalTensor",
    "MaxPool",
    "SpectralNorm",
    "assert_async",
    "has_any_global_hook",
    "in_backward",
    "in_transform",
    "is_tracing",
    "is_transformed",
    "register_decomposition",
    "register_namedtuple",
    "saving_is_hooked",
    "tree_leaves",
    "tree_map_only",
]

assert_async: Any = torch._assert_async
_functorch_is_active = torch._C._are_functorch_transforms_active


def in_transform() -> bool:
    """Return whether a transform of `torch.func` or forward-mode differentiation is at work."""
    return _functorch_is_active() or forward_ad._current_level >= 0


def is_transformed(tensor: torch.Tensor) -> bool:
    """Return whether a transform of `torch.func` wraps the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_backward() -> bool:
    """Return whether this thread runs a backward."""
    return torch._C._current_graph_task_id() != -1


def saving_is_hooked() -> bool:
    """Return whether hooks see tensors that are saved for a backward, as in checkpointing and off-loading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
