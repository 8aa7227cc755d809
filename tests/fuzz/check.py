"""Comparisons for each call: with its formula, raw ops, other numbers of threads, and single rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.fuzz.ops import HALF, Call, Draw

THREADS = (2, 3, 4, 8)
Parts = dict[str, Tensor]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cast(arguments: Any, dtype: torch.dtype | None) -> Any:
    """Convert floating tensors to another dtype, or at least to float32."""
    return tree_map_only(Tensor, lambda t: t.to(dtype or _wide(t.dtype)) if t.is_floating_point() else t, arguments)


def _noise(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator).to(t.dtype) for t in like]


def run(function: Callable[..., Any], call: Call, seed: int, order: int = 1, outputs: int | None = None) -> Parts:
    """Return the call's outputs, its gradients, and the gradients of their product with a vector.

    Only the first `outputs` outputs get a nonzero gradient.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in call.tensors.items()}
    result = function(**leaves, **call.fixed)
    values = list(result) if isinstance(result, tuple) else [result]
    parts = {f"output {i}": value.detach() for i, value in enumerate(values)}
    smooth = [value for value in values if value.requires_grad]
    if not order or not smooth:
        return parts
    upstream = _noise(smooth, seed)
    for grad in upstream[outputs:]:
        grad.zero_()
    upstream = [g.to(torch.promote_types(g.dtype, v.dtype)) for g, v in zip(upstream, smooth, strict=True)]
    grads = torch.autograd.grad(smooth, [*leaves.values()], upstream, create_graph=order > 1, materialize_grads=True)
    parts |= {f"gradient of {name}": grad.detach() for name, grad in zip(leaves, grads, strict=True)}
    linked = [grad for grad in grads if grad.requires_grad]
    if order > 1 and linked:
        vectors = _noise(linked, seed + 1)
        second = torch.autograd.grad(linked, [*leaves.values()], vectors, materialize_grads=True)
        parts |= {f"second gradient of {name}": grad for name, grad in zip(leaves, second, strict=True)}
    return parts


def _with(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    return Call(call.function, call.formula, {name: change(t) for name, t in call.tensors.items()}, call.fixed)


def _oracle(call: Call, dtype: torch.dtype | None, seed: int, order: int) -> Parts:
    changed = _with(call, lambda t: _cast(t, dtype))
    changed.fixed = _cast(call.fixed, dtype)
    return run(call.formula, changed, seed, order)


def differences(
    got: Tensor, exact: Tensor, plain: Tensor, moved: Sequence[Tensor], dtype: torch.dtype, terms: float
) -> Tensor:
    """Return each number's error as a multiple of the allowed error; 0 if it can't be judged.

    Args:
        got: The function's result.
        exact: The formula in float64.
        plain: The formula in the function's compute dtype.
        moved: The formula in float64 for inputs that differ in the last bit.
        dtype: The dtype of the function's inputs.
        terms: Magnitude of terms that cancel.
    """
    value = got.double()
    round_off = torch.finfo(got.dtype).eps / 2
    error = (plain.double() - exact).abs()
    error = torch.where(error.isfinite(), error, 0)
    sensitivity = torch.stack([(m - exact).abs() for m in moved]).amax(0)
    sensitivity = torch.where(sensitivity.isfinite(), sensitivity, 0)
    wide = torch.finfo(_wide(dtype))
    allowed = (
        8 * wide.eps * terms + 2 * round_off * exact.abs() + 16 * sensitivity + 4 * sensitivity.mean() + 8 * error.max()
    )
    allowed = allowed + 4 * max(torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps, wide.tiny)
    allowed = allowed + 16 * wide.eps * exact[exact.isfinite()].abs().mean().nan_to_num() / max(1, exact.numel()) ** 0.5
    if got.dtype == torch.float64:  # The formula also rounds.
        allowed = allowed + 2 * wide.eps * exact.abs()
    away = torch.minimum((value - exact).abs(), (value - plain.double()).abs()) / allowed
    same = (value == exact) | (value == plain.double()) | (value.isnan() & (exact.isnan() | plain.isnan()))
    # Beyond the largest number of the dtype.
    same = (
        same
        | ~plain.isfinite() & exact.isfinite()
        | (value.isinf() & (exact.abs() > 0.99 * torch.finfo(got.dtype).max))
    )
    return torch.where(same, 0, away.nan_to_num(torch.inf, torch.inf))


def against_formula(call: Call, draw: Draw, seed: int) -> Iterator[str]:
    dtype = next(iter(call.tensors.values())).dtype
    for t in call.tensors.values():
        dtype = t.dtype if t.dtype in HALF else dtype
    finite = all(bool(t.isfinite().all()) for t in call.tensors.values())
    order = 0 if not (call.gradients and finite) else 1 if dtype in HALF else draw.pick(1, 1, 2)
    got = run(call.function, call, seed, order)
    exact, plain = (
        _oracle(call, torch.float64, seed, order),
        _oracle(call, dtype if call.in_half else None, seed, order),
    )
    if dtype == torch.float64:  # Scaled from plain PyTorch's error in float32, as no dtype is wider than float64.
        scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        plain = {
            name: exact[name] + (value - exact[name]).nan_to_num(0, 0, 0) * scale
            for name, value in _oracle(call, torch.float32, seed, order).items()
        }
    moved: dict[bool, list[Parts]] = {}
    for in_half in {call.in_half, call.in_half or (dtype in HALF and order > 0)}:
        step = torch.finfo(dtype if in_half else _wide(dtype)).eps

        def nudge(t: Tensor, step: float = step) -> Tensor:
            return t.double() * (1 + step * torch.randint(-1, 2, t.shape, generator=draw.generator))

        def raise_all(t: Tensor, step: float = step) -> Tensor:
            return t.double() + step * t.double().abs()

        nudges = (nudge, nudge, raise_all)
        moved[in_half] = [_oracle(_with(call, change), torch.float64, seed, order) for change in nudges]
    same_choice = True
    for name, value in got.items():
        if name not in exact:  # The formula does not depend on anything there.
            exact[name] = plain[name] = torch.zeros_like(value, dtype=torch.float64)
            moved = {key: [{**parts, name: exact[name]} for parts in sets] for key, sets in moved.items()}
        want = exact[name]
        if value.shape != want.shape:
            yield f"{name} has shape {tuple(value.shape)} in place of {tuple(want.shape)}"
            continue
        if not value.is_floating_point():
            same_choice = torch.equal(value, want)
            if call.exact and not same_choice:
                yield f"{name}: {int((value != want).sum())} of {value.numel()} differ, first {_first(value != want)}"
            continue
        if name.startswith(("gradient", "second")) and not same_choice:
            continue
        if not value.numel():
            continue
        sets = moved[call.in_half or (dtype in HALF and "gradient" in name)]
        off = differences(
            value, want, plain[name], [m[name] for m in sets], dtype, call.terms * name.startswith("output")
        )
        if bool((off > 1).any()):
            at = int(off.argmax())
            is_, should, simple = (some.flatten()[at].item() for some in (value, want, plain[name]))
            yield (
                f"{name}: {int((off > 1).sum())} of {off.numel()} wrong, at {_place(off, at)} {is_} "
                f"in place of {should} (plain PyTorch {simple}), {off.max().item():.3g} times the allowed error"
            )


def _first(wrong: Tensor) -> tuple[int, ...]:
    return tuple(wrong.nonzero()[0].tolist())


def _place(tensor: Tensor, flat: int) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape))


def _unequal(one: Parts, other: Parts) -> list[str]:
    """Return the names of the parts that differ in any bit, except in NaN."""
    return [
        f"{name} ({int((~((a == other[name]) | (a.isnan() & other[name].isnan()))).sum())} of {a.numel()})"
        for name, a in one.items()
        if not bool(((a == other[name]) | (a.isnan() & other[name].isnan())).all())
    ]


def across_threads(call: Call, seed: int) -> Iterator[str]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(call.function, call, seed)
        for count in THREADS:
            torch.set_num_threads(count)
            if names := _unequal(one, run(call.function, call, seed)):
                yield f"{count} threads give other bits than 1: {', '.join(names)}"
    finally:
        torch.set_num_threads(before)


def alone(call: Call, seed: int) -> Iterator[str]:
    """Compute the first output and its gradients for one image or cloud, in a batch and alone."""
    count = len(next(iter(call.tensors.values()))) if call.rows else 0
    if count < 2:
        return

    def ones(function: Callable[..., Any], some: Call) -> Parts:
        leaves = {name: t.detach().requires_grad_() for name, t in some.tensors.items()}
        result = function(**leaves, **some.fixed)
        values = result if isinstance(result, tuple) else (result,)
        parts = {f"output {i}": value.detach() for i, value in enumerate(values) if i == 0 or value.dim() > 1}
        smooth = [value for value in values if value.requires_grad][:1]
        if smooth:
            wanted = [name for name in leaves if name in some.rows or not some.rows]
            grads = torch.autograd.grad(smooth[0].sum(), [leaves[n] for n in wanted], materialize_grads=True)
            parts |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
        return parts

    whole = ones(call.function, call)
    for i in {0, count - 1}:
        single = call.row(i)
        single.rows = call.rows
        if names := _unequal(ones(call.function, single), {name: part[i : i + 1] for name, part in whole.items()}):
            yield f"row {i} alone gives other bits than in a batch of {count}: {', '.join(names)}"


class Watch(TorchDispatchMode):
    """Record arguments and results of all raw ops called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "paper_layers":
            return func(*args, **(kwargs or {}))
        kept = tree_map_only(Tensor, torch.clone, args)
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, kept, tree_map_only(Tensor, torch.clone, result)))
        return result


def spoiled(call: Call, draw: Draw, seed: int) -> Iterator[str]:
    """Call raw ops with one wrong argument; expect a clear error or a result, not a crash."""
    with Watch() as watch:
        run(call.function, call, seed)
    for func, args, _ in watch.calls:
        places = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        at = draw.pick(*places)
        args = (*args[:at], _spoil(args[at], draw), *args[at + 1 :])
        try:
            func(*args)
        except Exception as error:
            if "INTERNAL ASSERT" in str(error) or not str(error):
                yield f"{func} with argument {at} as {_describe(args[at])} says {error}"


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _spoil(tensor: Tensor, draw: Draw) -> Tensor:
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t[..., :-1] if t.dim() else t[None],
        lambda t: t[:-1] if t.dim() else t[None],
        lambda t: t[None],
        lambda t: t.new_empty(0),
        lambda t: t.to(draw.pick(torch.float16, torch.float64, torch.int32, torch.bool)),
        lambda t: torch.cat([t, t], -1) if t.dim() else t,
        lambda t: t.to("meta"),
    ]
    if tensor.dtype == torch.int64:
        far = draw.pick(-(2**63), 2**62, 2**31, -2, 10**6)
        changes += 4 * [lambda t: torch.full_like(t, far)]
    if tensor.is_floating_point():
        changes += [lambda t: torch.full_like(t, torch.nan), lambda t: torch._neg_view(t)]
    return draw.pick(*changes)(tensor)


def problems(call: Call, draw: Draw, seed: int) -> Iterator[str]:
    """Return all faults of a call."""
    if not call.large:
        yield from against_formula(call, draw, seed)
    yield from across_threads(call, seed)
    yield from alone(call, seed)
    yield from spoiled(call, draw, seed)
