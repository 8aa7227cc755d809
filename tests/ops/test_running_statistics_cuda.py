"""The CUDA kernel that moves running statistics."""

from __future__ import annotations

from testing.cuda_battery import DEVICE, needs_cuda
from tests.ops import test_running_statistics as on_cpu

pytestmark = needs_cuda


class TestRunningStatisticsOnDevice(on_cpu.TestRunningStatistics):
    device = DEVICE
