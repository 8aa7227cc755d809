"""Split batch norms as layers, and the context that runs one of their splits."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
from timm.layers import SplitBatchNorm2d as TimmNorm
# isort: on

from paper_layers import SplitBatchNorm1d, SplitBatchNorm2d, SplitBatchNorm3d
from paper_layers.adv_prop import use_split


def trained(norm: Any) -> Any:
    """Draw parameters and statistics that differ from their initial values and between splits."""
    for tensor in itertools.chain(norm.parameters(), norm.buffers()):
        if tensor.is_floating_point() and not tensor.is_meta:
            tensor.data.uniform_(0.5, 2)
    return norm


def state(norm: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(norm.state_dict())


def by_hand(x: Tensor, norm: Any, mean: Tensor, var: Tensor) -> Tensor:
    """Return a split's output for given statistics."""
    shape = (-1, *[1] * (x.dim() - 2))
    mean, var, weight, bias = (t.detach().view(shape) for t in (mean, var, norm.weight, norm.bias))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def by_batch(x: Tensor, norm: Any) -> Tensor:
    dims = [d for d in range(x.dim()) if d != 1]
    return by_hand(x, norm, x.mean(dims), x.var(dims, correction=0))


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("momentum", [0.1, 0.4])
def test_equals_timm(splits: int, momentum: float) -> None:
    """Keys load both ways, and training gives the same outputs, gradients and statistics."""
    ours = trained(SplitBatchNorm2d(4, eps=1e-3, momentum=momentum, num_splits=splits, dtype=torch.float64))
    theirs = TimmNorm(4, eps=1e-3, momentum=momentum, num_splits=splits).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for _ in range(2):
        x = torch.randn(6, 4, 3, 5, dtype=torch.float64)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(leaf) for norm, leaf in zip((ours, theirs), leaves, strict=True)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.cos().sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    grads = [{name: p.grad for name, p in norm.named_parameters()} for norm in (ours, theirs)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    again = SplitBatchNorm2d(4, num_splits=splits, dtype=torch.float64)
    again.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(again.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (SplitBatchNorm1d, (6, 3)),
        (SplitBatchNorm1d, (6, 3, 5)),
        (SplitBatchNorm2d, (6, 3, 4, 2)),
        (SplitBatchNorm3d, (6, 3, 2, 4, 2)),
    ],
)
def test_formula(kind: Any, shape: tuple[int, ...]) -> None:
    norm, x = trained(kind(3, dtype=torch.float64)), torch.randn(shape, dtype=torch.float64)
    before = state(norm)
    want = torch.cat([by_batch(part, one) for part, one in zip(x.split(3), norm.split_norms, strict=True)])
    torch.testing.assert_close(norm(x), want)
    dims = [d for d in range(x.dim()) if d != 1]
    for prefix, part in (("", x[:3]), ("aux_bn.0.", x[3:])):
        moved = {"running_mean": part.mean(dims), "running_var": part.var(dims)}
        for name, new in moved.items():
            torch.testing.assert_close(norm.state_dict()[prefix + name], 0.9 * before[prefix + name] + 0.1 * new)
        assert norm.state_dict()[f"{prefix}num_batches_tracked"] == 1
    torch.testing.assert_close(norm.eval()(x[:1]), by_hand(x[:1], norm, norm.running_mean, norm.running_var))


@pytest.mark.parametrize(
    ("split_sizes", "batch", "want"),
    [
        (None, 6, [2, 2, 2]),
        ((1, 3, 2), 6, [1, 3, 2]),
        ((0.5, 0.25, 0.25), 8, [4, 2, 2]),
        ((0.5, 0.25, 0.25), 6, [3, 1, 2]),
        ((0.2, 0.2, 0.6), 7, [1, 2, 4]),
        (np.array([1, 3, 2]), 6, [1, 3, 2]),
        ((np.int64(1), 3, 2), 6, [1, 3, 2]),
        (np.array([0.2, 0.2, 0.6]), 7, [1, 2, 4]),
        (np.array([0.2, 0.2, 0.6], np.float32), 7, [1, 2, 4]),
    ],
)
def test_sizes(split_sizes: Any, batch: int, want: list[int]) -> None:
    """Equal sizes, given sizes, and proportions of any batch, with rounded ends."""
    norm = trained(SplitBatchNorm2d(3, num_splits=3, split_sizes=split_sizes, dtype=torch.float64))
    x = torch.randn(batch, 3, 2, 2, dtype=torch.float64)
    parts = zip(x.split(want), norm.split_norms, strict=True)
    torch.testing.assert_close(norm(x), torch.cat([by_batch(part, one) for part, one in parts]))
    assert norm.split_sizes is None or {*map(type, norm.split_sizes)} <= {int, float}


def test_plain_checkpoint_fills_every_split() -> None:
    plain = trained(nn.BatchNorm2d(3))
    for assign in (False, True):
        norm = SplitBatchNorm2d(3, num_splits=3)
        checkpoint = state(plain)
        norm.load_state_dict(checkpoint, assign=assign)
        assert list(checkpoint) == list(plain.state_dict())
        for one in norm.split_norms:
            for name, value in plain.state_dict().items():
                assert torch.equal(getattr(one, name), value)
        assert len({t.data_ptr() for t in norm.state_dict().values()}) == 15
        kept = {name: t for name, t in norm.state_dict().items() if "aux_bn" not in name}
        nn.BatchNorm2d(3).load_state_dict(kept)


@pytest.mark.tracing
@pytest.mark.parametrize("momentum", [0.1, None])
def test_export_in_training(momentum: float | None) -> None:
    """An exported graph moves the statistics, by ops that ONNX has as well."""
    norm, x = trained(SplitBatchNorm2d(3, momentum=momentum)), torch.randn(4, 3, 2, 5)
    twin, batch = copy.deepcopy(norm), torch.export.Dim("half", min=2) * 2
    program = torch.export.export(norm, (torch.cat([x, x]),), dynamic_shapes=({0: batch},))
    assert not [node for node in program.graph.nodes if "running_statistics" in str(node.target)]
    exported = program.module()
    torch.testing.assert_close(exported(torch.cat([x, x])), twin(torch.cat([x, x])))
    torch.testing.assert_close(dict(exported.named_buffers()), dict(twin.named_buffers()))


def test_few_dispatched_ops() -> None:
    """One op forward and one backward; two plain norms dispatch 6 each, and timm's split norm 18 in all."""
    norm, x = SplitBatchNorm2d(8), torch.randn(4, 8, 2, 2, requires_grad=True)
    grad = torch.ones(4, 8, 2, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        norm(x).backward(grad)
    names = [event.name for event in profile.events() or ()]
    ours = ["paper_layers::split_batch_norm_training_", "paper_layers::split_batch_norm_backward"]
    assert [name for name in names if name.startswith("paper_layers::")] == ours
    dispatched: list[Any] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            dispatched.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        norm(x).backward(grad)
    assert len(dispatched) <= 11, dispatched


def test_split_in_eval_uses_its_running_statistics() -> None:
    norm, x = trained(SplitBatchNorm2d(3, num_splits=3)).eval(), torch.randn(5, 3, 4, 4)
    before = state(norm)
    for split, one in enumerate(norm.split_norms):
        with use_split(norm, split):
            torch.testing.assert_close(norm(x), by_hand(x, one, one.running_mean, one.running_var))
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("update", [True, False])
def test_split_in_training_has_the_whole_batch(update: bool) -> None:
    norm, x = trained(SplitBatchNorm2d(3)), torch.randn(5, 3, 4, 4)
    before = state(norm)
    with use_split(norm, 1, update_statistics=update):
        torch.testing.assert_close(norm(x), by_batch(x, norm.aux_bn[0]))
    after = norm.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    names = {f"aux_bn.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved == (names if update else set())
    if update:
        want = 0.9 * before["aux_bn.0.running_mean"] + 0.1 * x.mean((0, 2, 3))
        torch.testing.assert_close(after["aux_bn.0.running_mean"], want)


def test_splits_nest_and_end() -> None:
    """The inner context wins, and each restores what it found, also after an error."""
    model = nn.Sequential(trained(SplitBatchNorm2d(3, num_splits=3)), nn.ReLU()).eval()
    x = torch.randn(5, 3, 4, 4)
    alone = [copy.deepcopy(model)(x)]
    for split in (1, 2):
        with use_split(model, split):
            alone.append(model(x))
    with use_split(model, 1, update_statistics=False):
        with use_split(model, 2):
            assert torch.equal(model(x), alone[2])
        assert torch.equal(model(x), alone[1])
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"), use_split(model, 2):
            model(x[:, :2])
        assert torch.equal(model(x), alone[1])
        with pytest.raises(ValueError, match="at most 2"), use_split(model, 3):
            pass
        before = state(model)
        model.train()(x)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        model.eval()
    assert torch.equal(model(x), alone[0])


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
def test_compile(options: dict[str, Any]) -> None:
    """Compile without a graph break in training, eval and one split; statistics move as in eager mode."""
    norm = trained(SplitBatchNorm2d(3, **options))
    twin = copy.deepcopy(norm)
    torch._dynamo.reset()
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 2, 5).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        outputs = [module(x) for module in (compiled, twin)]
        torch.testing.assert_close(*outputs)
        assert outputs[0].stride() == outputs[1].stride()
        for output in outputs:
            output.square().sum().backward()
    torch.testing.assert_close(norm.state_dict(), twin.state_dict())
    grads = [{name: p.grad for name, p in module.named_parameters()} for module in (norm, twin)]
    torch.testing.assert_close(*grads)
    twin.eval()
    norm.eval()
    with use_split(norm, 1), use_split(twin, 1):
        torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(compiled(x), twin(x))


def test_one_graph_for_all_batches() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(SplitBatchNorm2d(3), backend=counter, dynamic=True, fullgraph=True)
    counts = []
    for size in (4, 6, 10):
        compiled(torch.randn(size, 3, 5, 7)).sum().backward()
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_export() -> None:
    norm, x = trained(SplitBatchNorm2d(3)), torch.randn(4, 3, 2, 5)
    batch = {0: 2 * torch.export.Dim("half", min=2)}
    program = torch.export.export(norm, (x,), dynamic_shapes=(batch,))
    longer = torch.randn(10, 3, 2, 5)
    torch.testing.assert_close(program.module()(longer), copy.deepcopy(norm)(longer))
    program = torch.export.export(norm.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(longer[:7]), norm(longer[:7]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Under autocast, convolutions return half features for float32 parameters and statistics."""
    norm = trained(SplitBatchNorm2d(3))
    x = torch.randn(6, 3, 4, 4).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        output = norm(x)
    parts = zip(x.detach().float().split(3), norm.split_norms, strict=True)
    want = torch.cat([by_batch(part, one) for part, one in parts])
    torch.testing.assert_close(output, want.to(dtype))
    output.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == torch.float32 for p in norm.parameters())
    torch.testing.assert_close(norm.aux_bn[0].bias.grad, 2 * output[3:].float().sum((0, 2, 3)), rtol=1e-2, atol=1e-2)


def test_reset_and_repr() -> None:
    norm = SplitBatchNorm2d(3, num_splits=3, split_sizes=(0.5, 0.25, 0.25))
    fresh = state(norm)
    trained(norm).reset_parameters()
    torch.testing.assert_close(norm.state_dict(), fresh, rtol=0, atol=0)
    assert "num_splits=3, split_sizes=(0.5, 0.25, 0.25)" in repr(norm)
    assert list(SplitBatchNorm2d(3, affine=False, track_running_stats=False).state_dict()) == []


X = torch.ones(4, 3, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SplitBatchNorm2d(3)(X[:3]), ValueError, "batch that num_splits=2 divides, got 3; set split_sizes"),
        (lambda: SplitBatchNorm1d(3)(X[:2, :, 0, 0]), ValueError, r"at least 2 values per channel .* \[1, 1\]"),
        (lambda: SplitBatchNorm2d(3, split_sizes=(1, 2))(X), ValueError, r"sum to the batch, 4, got \[1, 2\]"),
        (lambda: SplitBatchNorm2d(3, split_sizes=(1, 2, 3)), ValueError, "expected num_splits=2 of them"),
        (lambda: SplitBatchNorm2d(3, split_sizes=(0.5, 0.6)), ValueError, "proportions that sum to 1"),
        (lambda: SplitBatchNorm2d(3, split_sizes=(4, 0)), ValueError, "split_sizes: expected sizes above 0"),
        (lambda: SplitBatchNorm2d(3, split_sizes=(1, 0.5)), TypeError, "expected ints, or floats"),
        (lambda: SplitBatchNorm2d(3, num_splits=1), ValueError, "num_splits: expected at least 2, got 1"),
        (lambda: SplitBatchNorm2d(3, num_splits=2.0), TypeError, "num_splits: expected an int"),  # type: ignore[arg-type]
        (lambda: SplitBatchNorm2d(-1), ValueError, "num_features: expected at least 0"),
        (lambda: SplitBatchNorm1d(3)(X), ValueError, r"expected shape \(N, 3\) or \(N, 3, L\), got"),
        (lambda: SplitBatchNorm2d(3)(X[0]), ValueError, r"expected shape \(N, 3, H, W\), got \(3, 2, 2\)"),
        (lambda: SplitBatchNorm3d(3)(X), ValueError, r"expected shape \(N, 3, D, H, W\), got"),
        (lambda: SplitBatchNorm2d(4)(X), ValueError, r"input: expected shape \(N, 4, H, W\), got"),
        (lambda: SplitBatchNorm2d(3).aux_bn[0](X), RuntimeError, r"with use_split\(model, 1\)"),
        (lambda: use_split(SplitBatchNorm2d(3), 2).__enter__(), ValueError, "split: expected at most 1, .* got 2"),
        (lambda: use_split(SplitBatchNorm2d(3), -1).__enter__(), ValueError, "split: expected at least 0"),
        (lambda: use_split(SplitBatchNorm2d(3), True).__enter__(), TypeError, "split: expected an int"),
        (lambda: use_split(nn.ReLU(), 0).__enter__(), ValueError, "at least one split batch norm, got none in ReLU"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_auxiliary_norms_with_hooks() -> None:
    """An auxiliary norm with hooks is called, compiled too; another module in its place is refused."""
    norm, x = SplitBatchNorm2d(3), torch.randn(4, 3, 2, 2)
    twin = copy.deepcopy(norm)
    norm.aux_bn[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    compiled = torch.compile(copy.deepcopy(norm), backend="aot_eager", fullgraph=True)
    first, second = twin(x).chunk(2)
    for run in (norm, compiled):
        torch.testing.assert_close(run(x), torch.cat([first, 2 * second]))
    torch.testing.assert_close(norm.state_dict(), twin.state_dict())
    with pytest.raises(RuntimeError, match="expected to be run by its SplitBatchNorm"):
        norm.aux_bn[0](x)
    for other in (nn.SyncBatchNorm(3), nn.Identity()):
        with pytest.raises(TypeError, match=f"aux_bn.0: expected an AuxiliaryNorm, got {type(other).__name__}"):
            norm.set_submodule("aux_bn.0", other)
