"""Swapped semantic models with hooks, threads, copies, compile, export and DDP."""

from __future__ import annotations

import concurrent.futures
import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paper_layers import swap
from tests.point_rend.test_swap import FEW, NAMES, Net, images, labels, net


def test_hooks() -> None:
    model, calls = Net(), []
    for name, module in ("model", model), ("head", model.head):
        module.register_forward_hook(lambda _, args, output, name=name: calls.append((name, output)))
    swap.point_rend(model, **NAMES, **FEW).eval()
    assert calls == []
    output = model(images())
    assert [name for name, _ in calls] == ["head", "model"]
    assert calls[1][1] is output


def test_nothing_is_held() -> None:
    """No captured map stays after a forward, after an error, or after a call of a single part."""
    model = net().eval()

    def held() -> list[int]:
        return [len(tap.outputs) for tap in model._point_rend_taps]

    model(images())
    assert held() == [0, 0, 0]
    model.head(images(1, 12, 4, 4))
    assert held() == [0, 0, 0]
    with pytest.raises(TypeError):
        model(images(), shift="one")
    assert held() == [0, 0, 0]


def test_threads() -> None:
    model = net().eval()
    several = [images(1, 3, 64, 64) for _ in range(16)]
    with torch.no_grad():
        expected = [model(x) for x in several]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            actual = list(pool.map(torch.no_grad()(model), several))
    torch.testing.assert_close(actual, expected)


def test_copies() -> None:
    model, x = net().eval(), images()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    expected = model(x)
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False):
        assert repr(twin) == repr(model)
        assert type(twin) is type(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        torch.testing.assert_close(twin(x), expected)
        model.load_state_dict(twin.state_dict())
    fresh = net().eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), expected)


def test_later_hooks_of_a_pickled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks added later do not replace ours, though torch counts hooks from 0 in a new process."""
    model, x = net().eval(), images()
    data, expected = pickle.dumps(model), model(x)
    (number,) = model.head._forward_hooks
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    twin = pickle.loads(data)
    for _ in range(number + 1):
        twin.head.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize(
    ("as_dict", "ways"),
    [(True, [(False, {}), (True, {})]), (False, [(True, {"target": torch.ones(2, 32, 48, dtype=torch.int64)})])],
)
def test_compile(as_dict: bool, ways: list[tuple[bool, dict[str, Tensor]]]) -> None:
    model, x = net(as_dict), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training, arguments in ways:
        model.train(training)
        state = copy.deepcopy(model.state_dict())
        results, grads = [], []
        for one in model, compiled:
            model.load_state_dict(state)
            torch.manual_seed(1)
            results.append(one(x, **arguments))
            tensors = list(results[-1].values()) if isinstance(results[-1], dict) else [results[-1]]
            loss = sum(tensor.square().mean() for tensor in tensors)
            grads.append(torch.autograd.grad(loss, list(model.parameters())))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*grads)
    assert all(tap.outputs == {} for tap in model._point_rend_taps)


def test_compiled_before() -> None:
    model, x = Net().eval(), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    old = compiled(x)
    assert swap.point_rend(compiled, **NAMES, **FEW) is compiled
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), old)


def test_export() -> None:
    model, x = net().eval(), images()
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_ddp() -> None:
    model = net()
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        F.cross_entropy(parallel(images()), labels()).backward()
        output = parallel(images(), target=labels())
        (output["loss_point"] + F.cross_entropy(output["out"], labels())).backward()
    assert all(p.grad.count_nonzero() for p in model.parameters())
