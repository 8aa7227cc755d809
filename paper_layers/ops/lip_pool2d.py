"""Local importance-based pooling: the op, its backward, and the function that users call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_layers._core import checks, dtypes
from paper_layers._core.differentiable import differentiable
from paper_layers._core.layout import memory_format
from paper_layers._core.library import define
from paper_layers._core.tracing import leaf
from paper_layers._core.vmap import folded

_GEOMETRY = "int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode"


def _output_size(length: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    size = (length + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    # As in torch's pools, every window starts inside the image or its left padding.
    if ceil_mode and (size - 1) * stride >= length + padding:
        size -= 1
    return size


def _output_shape(
    input: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], ceil_mode: bool
) -> list[int]:
    spatial = zip(input.shape[2:], kernel_size, stride, padding, strict=True)
    return [*input.shape[:2], *(_output_size(*sizes, ceil_mode) for sizes in spatial)]


class _Taps:
    """The windows of a padded image as strided slices, one for each kernel position that meets the image."""

    def __init__(self, input: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], ceil_mode: bool):
        self.size = _output_shape(input, kernel_size, stride, padding, ceil_mode)[2:]
        self.stride = stride
        self.offsets = []
        # Up to the end of the last window, which ceil_mode may place beyond the padding.
        self.pad: list[int] = []
        for n, length, k, s, p in zip(self.size, input.shape[2:], kernel_size, stride, padding, strict=True):
            first, last = 0, k
            if isinstance(length, int):  # this would bound a symbol
                first, last = max(0, p - (n - 1) * s), min(k, length + p)
            self.offsets.append(range(last - first))
            self.pad = [p - first, (n - 1) * s + last - length - p, *self.pad]

    def slices(self) -> Iterator[tuple[Any, ...]]:
        for offset in itertools.product(*self.offsets):
            yield (
                ...,
                *(slice(i, i + (n - 1) * s + 1, s) for i, n, s in zip(offset, self.size, self.stride, strict=True)),
            )

    def stack(self, input: Tensor, value: float) -> Tensor:
        padded = F.pad(input, self.pad, value=value)
        return torch.stack([padded[index] for index in self.slices()])

    def scatter(self, taps: Tensor, like: Tensor) -> Tensor:
        padded = F.pad(torch.zeros_like(like, dtype=taps.dtype), self.pad)
        for tap, index in zip(taps, self.slices(), strict=True):
            padded[index] += tap
        return F.pad(padded, [-p for p in self.pad])


def _reference(input: Tensor, logit: Tensor, *geometry: Any) -> Tensor:
    """The formula: soft-max over each window's logits, then the weighted sum."""
    dtype = dtypes.accumulation(input)
    taps = _Taps(input, *geometry)
    weight = taps.stack(logit.to(dtype), -torch.inf).softmax(0)
    output = (weight * taps.stack(input.to(dtype), 0.0)).sum(0).to(input.dtype)
    return output.contiguous(memory_format=memory_format(input))


def _fake(input: Tensor, logit: Tensor, *geometry: Any) -> Tensor:
    return input.new_empty(_output_shape(input, *geometry)).to(memory_format=memory_format(input))


def _backward_reference(
    grad: Tensor, input: Tensor, logit: Tensor, output: Tensor, *geometry: Any
) -> tuple[Tensor, Tensor]:
    dtype = dtypes.accumulation(input)
    taps = _Taps(input, *geometry)
    weight = taps.stack(logit.to(dtype), -torch.inf).softmax(0)
    values = taps.stack(input.to(dtype), 0.0)
    # The error of a rounded output adds up over a window, while the gradients of its logits cancel.
    deviation = values - (output if output.dtype == dtype else (weight * values).sum(0))
    grad_input = taps.scatter(grad.to(dtype) * weight, input)
    grad_logit = taps.scatter(grad.to(dtype) * weight * deviation, input)
    if logit.shape[1] != input.shape[1]:
        grad_logit = grad_logit.sum(1, keepdim=True)
    layout = memory_format(input)
    return (
        grad_input.to(input.dtype).contiguous(memory_format=layout),
        grad_logit.to(logit.dtype).contiguous(memory_format=layout),
    )


def _backward_fake(grad: Tensor, input: Tensor, logit: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    return torch.empty_like(input, memory_format=layout), torch.empty_like(logit, memory_format=layout)


_forward_op = define(
    f"lip_pool2d(Tensor input, Tensor logit, {_GEOMETRY}) -> Tensor", _reference, _fake, decompose=True
)
_backward_op = define(
    f"lip_pool2d_backward(Tensor grad, Tensor input, Tensor logit, Tensor output, {_GEOMETRY}) -> (Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    decompose=True,
)


def _second_order(
    along: tuple[Tensor, Tensor], grad: Tensor, input: Tensor, logit: Tensor, *geometry: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of <backward(grad, input, logit), along> with respect to grad, input and logit.

    With averages E over a window, and a and b the two parts of `along`, a window adds grad * (E[a] + E[b (x - E[x])])
    to the product. All terms are relative to averages, so a large offset of the input costs no digits.
    """
    dtype = dtypes.accumulation(input)
    taps = _Taps(input, *geometry)
    weight = taps.stack(logit.to(dtype), -torch.inf).softmax(0)

    def centered(images: Tensor) -> tuple[Tensor, Tensor]:
        values = taps.stack(images.to(dtype), 0.0)
        mean = (weight * values).sum(0)
        return mean, values - mean

    _, x = centered(input)
    x = x - (weight * x).sum(0)  # the rounding error of the offset
    mean_a, a = centered(along[0])
    _, b = centered(along[1])
    covariance = (weight * b * x).sum(0)
    share = grad.to(dtype) * weight
    # The adjoint of `stack`, itself differentiable and open to vmap.
    scatter = torch.func.vjp(lambda images: taps.stack(images, 0.0), torch.zeros_like(input, dtype=dtype))[1]
    grad_logit = scatter(share * (a + b * x - covariance))[0]
    if logit.shape[1] != input.shape[1]:
        grad_logit = grad_logit.sum(1, keepdim=True)
    return (mean_a + covariance).to(grad.dtype), scatter(share * b)[0].to(input.dtype), grad_logit.to(logit.dtype)


_pooled = differentiable("lip_pool2d", _forward_op, _backward_op, second=_second_order, vmap=folded(), exposed=(0,))


@leaf
def lip_pool2d(
    input: Tensor,
    logit: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
) -> Tensor:
    r"""Average each window with weights ``exp(logit)``: local importance-based pooling.

    .. math:: O_o = \frac{\sum_{i \in \Omega_o} e^{l_i} x_i}{\sum_{i \in \Omega_o} e^{l_i}}

    Equation 1 of Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019, with
    importance :math:`F = e^l`. Padding has weight zero. Computed relative to the largest logit, so any
    finite logits are safe; a weight that underflows is zero, and makes NaN of an infinite input. Half types
    accumulate in float32. Constant logits give average pooling
    without the padding, ``logit=input`` gives SoftPool.

    Args:
        input: Images of shape (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16.
        logit: Logits of the input's shape, or with one channel that all channels share.
            If its dtype differs from the input's, both are promoted as in torch's arithmetic.
        kernel_size: Size of the window in pixels, one number or (height, width).
        stride: Step of the window in pixels; default, or empty, `kernel_size`.
        padding: Pixels of padding on each side, at most half of `kernel_size`.
        ceil_mode: Round the output size up instead of down: the last windows, or the only one of a small image, may
            reach beyond the padding.

    Returns:
        Tensor of shape (N, C, H_out, W_out) or (C, H_out, W_out), sizes as in `torch.nn.functional.avg_pool2d`,
        in the memory format of `input`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, sizes or devices do not fit.

    Example:
        >>> import torch, paper_layers
        >>> x = torch.randn(2, 8, 32, 32)
        >>> paper_layers.lip_pool2d(x, logit=x, kernel_size=3, stride=2, padding=1).shape
        torch.Size([2, 8, 16, 16])
    """
    checks.floating("input", input)
    checks.floating("logit", logit)
    checks.same_device("logit", logit, "input", input)
    sizes = input.shape
    if not 3 <= len(sizes) <= 4:
        checks.shape("input", input, ("N", "C", "H", "W"), ("C", "H", "W"))
    if logit.shape != sizes:
        checks.shape("logit", logit, tuple(sizes), (*sizes[:-3], 1, *sizes[-2:]))
    kernel = checks.pair("kernel_size", kernel_size, 1)
    step = (
        kernel
        if stride is None or (isinstance(stride, tuple | list) and not stride)
        else checks.pair("stride", stride, 1)
    )
    pad = checks.pair("padding", padding, 0)
    for side in (0, 1):
        length, k, p = sizes[side - 2], kernel[side], pad[side]
        if 2 * p > k:
            raise ValueError(f"padding: expected at most half of kernel_size {kernel_size!r}, got {padding!r}")
        limit = length + 2 * p + (step[side] - 1 if ceil_mode else 0)
        if limit < k:
            most = f"the padded {('height', 'width')[side]}{' plus stride - 1' if ceil_mode else ''}, {limit}"
            raise ValueError(f"kernel_size: expected at most {most}, got {kernel_size!r}")
        if length < 1:
            raise ValueError(f"input: expected at least one row and one column, got {tuple(sizes)}")

    if input.dtype != logit.dtype:
        dtype = torch.promote_types(input.dtype, logit.dtype)
        input, logit = input.to(dtype), logit.to(dtype)
    geometry = (kernel, step, pad, bool(ceil_mode))
    if len(sizes) == 3:
        return _pooled(input[None], logit[None], geometry)[0]
    return _pooled(input, logit, geometry)
