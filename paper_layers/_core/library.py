"""The operator library: define ops, and load the compiled kernels."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from paper_layers._core._torch_private import register_decomposition, tree_leaves, tree_map_only
from paper_layers._core.version import __version__
from paper_layers._core.vmap import Rule

library = torch.library.Library("paper_layers", "DEF")

_PACKAGE = Path(__file__).resolve().parent.parent
_status: dict[str, str] = {}


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    decompose: bool | Callable[..., Any] = False,
    vmap: Rule | None = None,
    flops: Callable[..., int] | None = None,
) -> Any:
    """Define an op and return it.

    Args:
        schema: Name, arguments and results.
        reference: The formula in PyTorch, for every backend without a kernel.
        fake: The shapes, for tracing.
        decompose: Let ONNX export, which knows no op of ours, write the reference, or this function, in its place.
        vmap: The rule of an op that needs no gradient.
        flops: The operations of the op's products from its arguments, with shapes for tensors: a multiplication and an
            addition each, as `torch.utils.flop_counter` counts.
    """
    name = schema.split("(", 1)[0]
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"paper_layers::{name}", fake, lib=library)
    op = getattr(torch.ops.paper_layers, name).default
    if op._schema.is_mutable:
        library.impl(name, _without_negative_bits(op), "Negative")
    if decompose:
        register_decomposition(op)(reference if decompose is True else decompose)
    if flops is not None:
        register_flop_formula(op.overloadpacket)(lambda *arguments, out_shape, **_: flops(*arguments))
    if vmap is not None:
        torch.library.register_vmap(
            f"paper_layers::{name}", lambda info, dims, *args: vmap(op, info.batch_size, dims, args), lib=library
        )
    return op


def _without_negative_bits(op: Any) -> Callable[..., Any]:
    """Wrap an op that writes to its arguments for lazily negated tensors, on which torch's own fallback fails."""
    written = [argument.is_write for argument in op._schema.arguments]

    def call(*arguments: Any) -> Any:
        plain = tree_map_only(torch.Tensor, torch.Tensor.resolve_neg, list(arguments))
        result = op(*plain)
        for before, after, changed in zip(arguments, plain, written, strict=False):
            if changed:
                for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                    if old is not new:
                        old.copy_(new)
        return result

    return call


def _load(name: str, unusable: str | None) -> None:
    path = _PACKAGE / f"{name}.so"
    if unusable:
        _status[name] = f"not loaded: {unusable}"
    elif not path.exists():
        _status[name] = (
            f"not built: {path} does not exist; ops run as pure PyTorch "
            "(reinstall with PAPER_LAYERS_BUILD=require to see why the build failed)"
        )
    else:
        try:
            torch.ops.load_library(str(path))
            _status[name] = f"loaded from {path}"
        except OSError as error:
            _status[name] = f"failed to load {path}: {error.__cause__ or error}"


library.define("cpu_capability() -> str")

_load("_cpu", None)
_load("_cuda", None if torch.version.cuda else "this torch is built without CUDA")


def show_config() -> str:
    """Say which kernels are loaded, from where and for which instruction sets, or why they are not.

    Example:
        >>> import paper_layers
        >>> print(paper_layers.show_config())  # doctest: +ELLIPSIS
        paper_layers ...
    """
    lines = [f"paper_layers {__version__}, torch {torch.__version__}"]
    lines += [f"{name[1:]} kernels: {status}" for name, status in _status.items()]
    if _status["_cpu"].startswith("loaded"):
        lines.append(f"cpu instruction set: {torch.ops.paper_layers.cpu_capability()}")
        limit = os.environ.get("PAPER_LAYERS_CPU_CAPABILITY")
        if limit:
            lines.append(f"PAPER_LAYERS_CPU_CAPABILITY={limit}")
    return "\n".join(lines)
