"""Surgery on strided convolutions: their windows and options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from paper_layers import swap
from paper_layers.lip import LIPConv2d
from tests.lip.surgeries import images, sequential

sizes = st.integers(1, 5)


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 23), st.integers(1, 23)),
    st.tuples(sizes, sizes),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)) | st.just("valid"),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_conv_output_size(size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
    pads = (0, 0) if padding == "valid" else padding
    reach = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(size, pads, dilation, kernel, strict=True)]
    assume(min(reach) >= 1 and stride != (1, 1))
    conv = nn.Conv2d(1, 2, kernel, stride, padding, dilation, dtype=torch.float64)
    x = images(1, 1, *size, dtype=torch.float64)
    old = conv(x)
    assert swap.strided_conv(conv, "identity")(x).shape == old.shape
    # Each window's centre is a pixel of the strided convolution: importance only there must return that convolution.
    grid = torch.full(reach, -1e4, dtype=torch.float64)
    grid[:: stride[0], :: stride[1]] = 1e4
    conv.pool.logit = _Fixed(grid)
    torch.testing.assert_close(conv(x), old)


class _Fixed(nn.Module):
    def __init__(self, logit: Tensor):
        super().__init__()
        self.register_buffer("value", logit)

    def forward(self, input: Tensor) -> Tensor:
        return self.value.expand(*input.shape[:-3], 1, -1, -1)


@pytest.mark.parametrize(
    ("stride", "kernel"),
    [(2, (3, 3)), (3, (3, 3)), (4, (5, 5)), (5, (5, 5)), ((2, 1), (3, 1)), ((1, 4), (1, 5))],
)
def test_conv_window(stride: Any, kernel: Any) -> None:
    pool = swap.strided_conv(nn.Conv2d(3, 8, 3, stride)).pool
    assert (pool.channels, pool.kernel_size, pool.padding) == (8, kernel, tuple(k // 2 for k in kernel))


@pytest.mark.parametrize("options", [{"groups": 4}, {"bias": False}, {"padding_mode": "reflect"}, {"dilation": 2}])
def test_conv_options(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 8, 3, 2, 1, **options)
    dense = copy.deepcopy(conv)
    dense.stride = (1, 1)
    x = images(2, 4, 9, 9)
    expected = F.avg_pool2d(dense(x), 3, 2, 1, count_include_pad=False)
    torch.testing.assert_close(swap.strided_conv(conv)(x), expected)
    assert LIPConv2d(4, 8, 3, 2, 1, **options)(x).shape == expected.shape


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm() -> None:
    """Its hook sets an attribute to a tensor that is neither a parameter nor a leaf."""
    model = sequential()
    model[0] = torch.nn.utils.weight_norm(model[0])
    model(images())
    swap.strided_conv(swap.pooling(model))(images()).sum().backward()
    assert model[0].weight_g.grad is not None
