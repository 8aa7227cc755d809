"""The battery of the CUDA kernels, on the device that PAPER_LAYERS_TEST_DEVICE names.

The default is "cuda". "cpu" is for the build that runs the CUDA kernels on the CPU (csrc/emulation).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from testing.battery import Battery
from testing.cases import DTYPES, TOLERANCE, on_device

DEVICE = os.environ.get("PAPER_LAYERS_TEST_DEVICE", "cuda")
EMULATED = DEVICE == "cpu"
needs_cuda = pytest.mark.skipif(
    not EMULATED and not torch.cuda.is_available(), reason="needs a CUDA device: none is available"
)
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def smaller(size: int, emulated: int) -> int:
    """Return the size, or the one for the emulation, where as much takes minutes."""
    return emulated if EMULATED else size


def needs_memory(gibibytes: int) -> None:
    """Skip the test where the device has less free memory."""
    if torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free device memory")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return normal numbers on the device, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def table(*shape: int, rows: int, seed: int = 0) -> Tensor:
    """Return a table of neighbours on the device, some repeated and some missing."""
    return torch.randint(-1, rows, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def offset(x: Tensor) -> Tensor:
    """Copy with the same strides, one element into the storage: not aligned for loads of several elements."""
    return x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "offset": lambda x: offset(x.contiguous()),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every_other": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


def assert_near(
    got: Tensor, want: Tensor, dtype: torch.dtype, *, rtol: float = 1.0, atol: float = 1.0, name: str = "result"
) -> None:
    """Compare with a float64 result on the CPU. Both tolerances are multiples of the dtype's."""
    tolerance = TOLERANCE[dtype][0]
    assert got.device.type == DEVICE
    torch.testing.assert_close(
        got.cpu().double(),
        want.double(),
        rtol=rtol * tolerance,
        atol=atol * tolerance,
        equal_nan=True,
        check_stride=False,
        msg=lambda text: f"{name}: {text}",
    )


@dataclass
class Step:
    """A function of tensors on the device, and the tensors for each seed."""

    inputs: Callable[[int], tuple[Tensor, ...]]
    function: Callable[..., tuple[Tensor, ...]]

    def run(self, seed: int = 0) -> tuple[Tensor, ...]:
        return self.function(*self.inputs(seed))


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Compare bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class CudaBattery(Battery):
    """The op's tests on the device, and those of CUDA. Comes before the op's class for the CPU among the bases."""

    device = DEVICE
    op_dtypes: tuple[torch.dtype, ...] = (torch.float32,)  # dtypes in which `op_arguments` fit the ops
    out_of_range: dict[str, str]  # code that fails an assertion on the device, by name

    test_bad_inputs = None  # the same messages, of tensors on the CPU
    test_lesser_instruction_set = None

    def __init_subclass__(cls) -> None:
        """Leave out what the op's class for the CPU tests on the same kernels, where they are emulated."""
        if EMULATED:
            for name in dir(cls):
                if name.startswith("test_") and name not in {**vars(CudaBattery), **vars(cls)}:
                    setattr(cls, name, None)

    def steps(self) -> dict[str, Step]:
        """All kernels of the op, forward and backward, in each of their forms."""
        raise NotImplementedError

    def refused(self) -> dict[str, Callable[[], Any]]:
        """Calls that the kernels refuse, by what the message says."""
        raise NotImplementedError

    def refused_devices(self) -> dict[str, Callable[[], Any]]:
        """Calls with tensors on several devices, by what the message says."""
        raise NotImplementedError

    def test_kernels_are_loaded(self) -> None:
        super().test_kernels_are_loaded()

    def test_opcheck(self, subtests: Any) -> None:
        for dtype in self.op_dtypes:
            for number, case in enumerate(self.fixed_cases()):
                for name, arguments in self.op_arguments(case.to(dtype)).items():
                    with subtests.test(f"{name} {number} {dtype}"):
                        placed, tests = on_device(arguments, DEVICE), ("test_schema", "test_faketensor")
                        torch.library.opcheck(self.ops[name], placed, test_utils=tests)

    def test_bad_arguments_are_refused_before_memory_is_touched(self, subtests: Any) -> None:
        for message, call in self.refused().items():
            with subtests.test(message), pytest.raises(RuntimeError, match=message):
                call()

    @pytest.mark.needs_gpu
    def test_mixed_devices_are_refused(self, subtests: Any) -> None:
        for message, call in self.refused_devices().items():
            with subtests.test(message), pytest.raises((RuntimeError, ValueError), match=message):
                call()

    def test_number_out_of_range_is_an_assertion(self, subtests: Any) -> None:
        """In a process of its own, since the device is of no more use to one that failed an assertion."""
        for name, code in self.out_of_range.items():
            with subtests.test(name):
                wait = "" if EMULATED else "torch.accelerator.synchronize()"
                lines = f"import torch, paper_layers\ntorch.set_default_device({DEVICE!r})\n{code}\n{wait}"
                command = [sys.executable, "-c", lines]
                result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
                assert result.returncode != 0
                assert "device-side assert" in result.stderr

    def test_same_every_time(self, subtests: Any) -> None:
        for name, step in self.steps().items():
            with subtests.test(name):
                first = step.run()
                for _ in range(2):
                    assert_equal(step.run(), first)

    @pytest.mark.needs_gpu
    def test_runs_on_the_current_stream(self, subtests: Any) -> None:
        for name, step in self.steps().items():
            with subtests.test(name):
                ready, late = step.inputs(0), step.inputs(3)
                want = step.function(*ready)
                torch.cuda.synchronize()
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(200_000_000)  # The op must wait for what comes before it on its own stream.
                    _overwrite(late, ready)
                    got = step.function(*late)
                stream.synchronize()
                assert_equal(got, want)

    @pytest.mark.needs_gpu
    def test_graph_capture(self, subtests: Any) -> None:
        """The host waits for nothing, and a replay reads what its tensors hold by then."""
        for name, step in self.steps().items():
            with subtests.test(name):
                tensors = step.inputs(0)
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    step.function(*tensors)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    captured = step.function(*tensors)
                _overwrite(tensors, step.inputs(3))
                graph.replay()
                assert_equal(captured, step.run(3))

    @needs_two_gpus
    @pytest.mark.needs_gpu
    def test_runs_on_the_device_of_its_input(self, subtests: Any) -> None:
        for name, step in self.steps().items():
            with subtests.test(name), torch.cuda.device(0):
                got = step.function(*(t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in step.inputs(0)))
                assert {t.device for t in got} == {torch.device("cuda:1")}
                assert_equal(tuple(t.cpu() for t in got), tuple(t.cpu() for t in step.run()))


@torch.no_grad()
def _overwrite(tensors: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
