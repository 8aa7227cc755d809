"""Tell a forward pass from its repetition under checkpointing."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Return True where `torch.utils.checkpoint` computes a forward pass again for its backward."""
    # Only a backward has a graph task. A compiled graph moves statistics by its own rules.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
