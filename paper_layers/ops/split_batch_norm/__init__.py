"""Batch norm of each part of a batch: one op, and its steps for norms whose sums go over ranks."""

from paper_layers.ops.split_batch_norm.op import split_batch_norm

__all__ = ["split_batch_norm"]
