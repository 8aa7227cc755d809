"""The CUDA kernels of edge_conv_norm against the formula in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from testing.cuda_battery import CudaBattery, Step, needs_cuda, random, table
from tests.ops import test_edge_conv_norm as on_cpu

pytestmark = needs_cuda

forward = torch.ops.paper_layers.edge_conv_norm
backward = torch.ops.paper_layers.edge_conv_norm_backward


class TestEdgeConvNormOnDevice(CudaBattery, on_cpu.TestEdgeConvNorm):
    out_of_range = {  # noqa: RUF012
        "index": "from paper_layers.ops.edge_conv_norm import edge_conv_norm\n"
        "edge_conv_norm(torch.ones(8, 4), torch.ones(8, 4), torch.full((2, 4, 3), 4))"
    }

    def steps(self) -> dict[str, Step]:
        def inputs(seed: int) -> tuple[Tensor, ...]:
            clouds = torch.stack([table(4500, 20, rows=50, seed=seed + i) for i in range(2)])
            return random(9000, 32, seed=seed), random(9000, 32, seed=seed + 1), clouds, random(32, seed=seed + 2)

        def function(center: Tensor, neighbor: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            output, extreme, mean, var, count = forward(
                center, neighbor, index, None, weight, None, None, None, 0.2, 1e-5, False
            )
            grads = backward(output, center, neighbor, index, None, weight, extreme, mean, var, 0.2, 1e-5, True)
            return output, mean, var, count, *grads

        return {"statistics of the edges": Step(inputs, function)}

    def refused(self) -> dict[str, Callable[[], Any]]:
        x, i = random(9, 4), table(9, 3, rows=9)
        others = (None, None, None, None, None, 1.0, 1e-5, False)
        return {
            "center: expected": lambda: forward(x[0], x, i, *others),
            "neighbor: expected": lambda: forward(x, x[:, :2], i, *others),
            "var: expected a Tensor": lambda: forward(x, x, i, None, None, None, x[0], None, 1.0, 1e-5, False),
        }

    def refused_devices(self) -> dict[str, Callable[[], Any]]:
        x, i = random(9, 4), table(9, 3, rows=9)
        others = (None, None, None, None, 1.0, 1e-5, False)
        return {
            "index: expected the device": lambda: forward(x, x, i.cpu(), None, *others),
            "weight: expected the device": lambda: forward(x, x, i, None, x[0].cpu(), *others[1:]),
        }
