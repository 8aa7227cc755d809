"""Windows beyond the image, large kernels and sizes of any magnitude."""

from __future__ import annotations

import importlib
import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from paper_layers import lip_pool2d
from testing.cases import Case
from tests.ops.test_lip_pool2d import formula, geometry, images

module = importlib.import_module("paper_layers.ops.lip_pool2d")  # The package has a function of this name.


def test_ceil_mode_takes_every_shape_that_max_pool2d_takes() -> None:
    """Also windows beyond a small image: the kernel and the reference, forward and backward."""
    taken = 0
    for k, s, h in itertools.product(range(1, 6), range(1, 6), range(1, 9)):
        for p in range(k // 2 + 1):
            w = 1 + (h + k + p) % 8
            case = Case((images(2, h, w), images(2, w, h).mT)).to(torch.float64)
            options = {"kernel_size": k, "stride": s, "padding": p, "ceil_mode": True}
            leaves, exact = case.leaves(), case.leaves()
            try:
                shape = F.max_pool2d(case.tensors[0], k, s, p, ceil_mode=True).shape
            except RuntimeError:
                with pytest.raises(ValueError, match="kernel_size: expected at most the padded"):
                    lip_pool2d(*leaves, **options)
                continue
            taken += 1
            output, expected = lip_pool2d(*leaves, **options), formula(*exact, **options)
            assert output.shape == shape
            grad = torch.ones_like(expected)
            got = (output, *torch.autograd.grad(output, leaves, grad))
            want = (expected, *torch.autograd.grad(expected, exact, grad))
            batch, places = [t[None] for t in case.tensors], geometry(**options)
            by_reference = (
                module._reference(*batch, *places),
                *module._backward_reference(grad[None], *batch, expected[None].detach(), *places),
            )
            for kernel, reference, exactly in zip(got, by_reference, want, strict=True):
                assert torch.allclose(kernel, exactly, 1e-9, 1e-11), options
                assert torch.allclose(reference[0], exactly, 1e-9, 1e-11), options
    assert taken > 300


def test_global_pools_on_small_images() -> None:
    """Kernels beyond the image cost nothing: neither memory nor, in the reference, slices."""
    case = Case((images(2, 3, 7, 5), images(2, 1, 7, 5)))
    input, logit = case.tensors
    weight = logit.flatten(2).softmax(-1)
    expected = (input.flatten(2) * weight).sum(-1)[..., None, None]
    for kernel, stride, padding in ((640, None, 0), (10**9, None, 0), ((9, 640), (3, 700), (1, 320))):
        options = {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": True}
        assert F.avg_pool2d(input, **options).shape == expected.shape
        leaves = case.leaves()
        output = lip_pool2d(*leaves, **options)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(module._reference(*case.tensors, *geometry(**options)), expected)
        grads = torch.autograd.grad(output.sum(), leaves)
        wanted = module._backward_reference(torch.ones_like(expected), *case.tensors, expected, *geometry(**options))
        torch.testing.assert_close(grads, wanted)
        torch.testing.assert_close(grads[0], weight.reshape(2, 1, 7, 5).expand(2, 3, 7, 5))
    status = Path("/proc/self/status")
    if status.exists():

        def peak() -> int:
            return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0])

        Path("/proc/self/clear_refs").write_text("5")
        before, one = peak(), torch.ones(1, 1, 1, 1)
        output = lip_pool2d(one, one, 10**7, 1, 5 * 10**6)
        torch.ops.paper_layers.lip_pool2d_backward(output, one, one, output, *geometry(10**7, 1, 5 * 10**6))
        assert torch.equal(output, torch.ones(1, 1, 2, 2))
        assert peak() - before < 16 * 1024


@pytest.mark.parametrize("shape", [(0, 2**56, 1, 1), (0, 2**31, 2**31, 1), (2**40, 0, 2**20, 1), (0, 1, 1, 2**61)])
def test_sizes_whose_products_wrap(shape: tuple[int, ...]) -> None:
    """An error or an empty result, never a crash."""
    for options in (geometry(1), geometry(2, 3, 1, True), geometry(2**31 - 1, 2**31 - 1, 2**30 - 1, True)):
        try:
            input = torch.empty(shape)
            output = torch.ops.paper_layers.lip_pool2d(input, input, *options)
            torch.ops.paper_layers.lip_pool2d_backward(output, input, input, output, *options)
        except RuntimeError:
            continue
        assert output.numel() == 0
