"""Checkpoint files with arrays of NumPy: read whole, without running anything, or not at all."""

from __future__ import annotations

import collections
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paper_layers import deep_gcn, lip, point_rend, soft_triple
from paper_layers._core.pickles import read, to_tensor
from paper_layers.deep_gcn import DeepGCN
from paper_layers.point_rend import PointRendHead
from paper_layers.soft_triple import SoftTripleLoss
from testing.official import deep_gcn as official

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    fc = generator.standard_normal((8, 6, 1)).astype(np.float32)
    return {
        "fc1.weight": fc,
        "fc1.bias": generator.standard_normal(8),
        "predictor.weight": np.asfortranarray(generator.standard_normal((2, 8, 1)).astype(np.float16)),
        "predictor.bias": generator.standard_normal(4)[::-2].astype(">f8"),
    }


def zoo() -> dict[str, Any]:
    """As detectron2's model zoo has it."""
    model = {f"sem_seg_head.point_head.{key}": value for key, value in arrays().items()}
    model |= {"pixel_mean": np.ones(3), "names": np.array(["a"]), "iteration": np.int64(3)}
    extra = {"cfg": None, "set": {1}, "flags": frozenset(), "order": collections.OrderedDict(a=1)}
    return {"model": model, "__author__": "Detectron2", "matching_heuristics": True, "best": np.float64(0.5), **extra}


def head() -> PointRendHead:
    return PointRendHead(4, 2, hidden_features=8, num_fc=1, coarse_pred_each_layer=False)


def check(head: PointRendHead) -> None:
    for name, layer in (("fc1", head.layers[0]), ("predictor", head.predictor)):
        weight, bias = (torch.from_numpy(arrays()[f"{name}.{key}"].astype(np.float32)) for key in ("weight", "bias"))
        assert torch.equal(layer.weight, weight[..., 0])
        assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_model_zoo(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(zoo(), protocol))
    check(point_rend.load_official(head(), path))
    # Names of NumPy 1, under which all published files were written.
    content = pickle.dumps(zoo(), protocol)
    if protocol < 4:  # After that names have a length before them.
        content = content.replace(b"numpy._core", b"numpy.core")
    path.write_bytes(content)
    check(point_rend.load_official(head(), str(path)))
    check(point_rend.load_official(head(), pickle.loads(content)))


@pytest.mark.parametrize("zipped", [False, True])
def test_numbers_of_numpy_beside_weights(zipped: bool, tmp_path: Path) -> None:
    """Official S3DIS training writes the best score with the weights."""
    state = {key: torch.from_numpy(np.array(value, value.dtype.newbyteorder("="))) for key, value in arrays().items()}
    saved = {"epoch": 3, "state_dict": state, "best_value": np.float64(0.5), "array": np.ones(2), "last": np.int64(1)}
    path = tmp_path / "model.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    before = set(torch.serialization.get_safe_globals())
    check(point_rend.load_official(head(), path))
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("dtype", ["b1", "i1", "u1", "<i2", ">i4", "i8", ">u2", "<f2", ">f4", "f8", ">c8", "c16"])
def test_every_dtype(dtype: str, tmp_path: Path) -> None:
    values = np.arange(-3, 9).reshape(2, 3, 2).astype(dtype)
    for array in (values, np.asfortranarray(values), values[:, ::2], values[:0], values[1, 1, 1:].reshape(())):
        expected = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
        assert torch.equal(to_tensor(array), expected)
        for protocol in PROTOCOLS:
            (tmp_path / "array.pkl").write_bytes(pickle.dumps(array, protocol))
            assert torch.equal(to_tensor(read(tmp_path / "array.pkl")), expected)


class Call:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def touch(path: Path) -> Call:
    return Call(os.system, f"touch {path}")


def named(module: bytes, name: bytes, arguments: bytes) -> bytes:
    """Protocol 4 looks a dotted name up step by step."""
    strings = b"".join(b"\x8c" + struct.pack("<B", len(text)) + text for text in (module, name))
    return b"\x80\x04" + strings + b"\x93" + b"\x8c" + struct.pack("<B", len(arguments)) + arguments + b"\x85R."


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_is_run(protocol: int, tmp_path: Path) -> None:
    proof, path = tmp_path / "proof", tmp_path / "model.pkl"
    command = f"touch {proof}".encode()
    payloads = [
        touch(proof),
        {"model": {"fc": touch(proof)}},
        Call(eval, f"open({str(proof)!r}, 'w')"),
        Call(getattr, Call(__import__, "os"), "system"),
        Call(np.fromfile, str(path)),
        Call(np.load, str(path)),
        Call(np.ndarray, touch(proof), (0,), b"b"),
        Call(torch.load, str(path)),
        Call(collections.namedtuple, "a", "b"),
        nn.Linear(1, 1),
    ]
    raw = [pickle.dumps(payload, protocol) for payload in payloads]
    raw += [named(module, name, command) for module, name in (
        (b"os", b"system"), (b"posix", b"system"), (b"numpy", b"os.system"), (b"numpy.core.multiarray", b"os.system"),
        (b"collections", b"OrderedDict.fromkeys.__self__"), (b"numpy", b"dtype.__class__"), (b"builtins", b"eval"),
        (b"paper_layers._core.pickles", b"os.system"), (b"builtins", b"set.__class__"),
    )]  # fmt: skip
    raw += [b"cos\nsystem\n(V" + command + b"\ntR.", b"(S'" + command + b"'\nios\nsystem\n.", b"garbage", b""]
    raw.append(b"\x80\x02cnumpy\ndtype\n}(X\x05\x00\x00\x00orderK\x01ub.")  # Sets an attribute of the name itself.
    for content in raw:
        path.write_bytes(content)
        with pytest.raises(pickle.UnpicklingError):
            point_rend.load_official(head(), path)
    for payload in payloads[:-1]:
        torch.save({"state_dict": payload}, path)
        with pytest.raises(pickle.UnpicklingError):
            point_rend.load_official(head(), path)
    assert not proof.exists()


def test_broken_arrays(tmp_path: Path) -> None:
    """Too few bytes, or Python objects: neither read beyond the bytes, nor taken."""
    content = pickle.dumps(np.arange(4, dtype=np.int64), 2)
    for wrong in (content.replace(b"K\x04\x85", b"K\x7f\x85"), pickle.dumps(np.array([object], dtype=object), 2)):
        (tmp_path / "array.pkl").write_bytes(wrong)
        with pytest.raises((ValueError, pickle.UnpicklingError)):
            to_tensor(read(tmp_path / "array.pkl"))


@pytest.mark.parametrize("zipped", [False, True, None])
def test_truncated_files(zipped: bool | None, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    if zipped is None:
        np.savez(path.with_suffix(".npz"), **arrays())
        path.with_suffix(".npz").rename(path)
    else:
        state = {key: torch.from_numpy(value.astype(np.float32)) for key, value in arrays().items()}
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for end in (len(content) - (zipped is not None), len(content) // 2, 100, 10, 0):
        path.write_bytes(content[:end])
        with pytest.raises(pickle.UnpicklingError):
            point_rend.load_official(head(), path)
    with pytest.raises(FileNotFoundError):
        point_rend.load_official(head(), tmp_path / "another")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_keys_of_compiled_models(prefix: str) -> None:
    check(point_rend.load_official(head(), {f"{prefix}{key}": value for key, value in arrays().items()}))


BAD: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda t: t.to("meta"), "fc1.weight, a tensor on the meta device"),
    (lambda t: t.to_sparse(), "fc1.weight, a torch.sparse_coo tensor where a dense one is expected"),
    (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "fc1.weight, a quantized tensor"),
    (lambda t: t.to(torch.complex64), "fc1.weight, a tensor of torch.complex64 where torch.float32 is expected"),
    (lambda t: t[:1], r"fc1.weight of shape \(1, 6, 1\)"),
    (lambda t: t.tolist(), "unexpected fc1.weight"),
    (lambda t: np.array(["a"]), "fc1.weight, an array of NumPy's dtype 'U1'"),
    (lambda t: t.numpy().astype(np.longdouble), "fc1.weight, an array of NumPy's dtype 'f"),
    (lambda t: np.longdouble(1), "fc1.weight, an array of NumPy's dtype 'f"),
    (lambda t: None, "unexpected fc1.weight"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_all_or_nothing(change: Callable[[Tensor], Any], message: str) -> None:
    """Whatever does not fit is last, when all else could have been loaded."""
    module, state = head(), {key: to_tensor(value) for key, value in arrays().items()}
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state["fc1.weight"] = change(state.pop("fc1.weight"))
    with pytest.raises(ValueError, match=message):
        point_rend.load_official(module, state)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_keys_and_modules() -> None:
    for load, module in (
        (point_rend.load_official, head()),
        (soft_triple.load_official, SoftTripleLoss(2, 3)),
        (deep_gcn.load_official, DeepGCN(3, 2, channels=4, blocks=2)),
        (lip.load_official, lip.LIPPool2d(2)),
    ):
        for key in (0, None, ("fc", 1)):
            with pytest.raises(TypeError, match="state_dict: expected strings as keys, got"):
                load(module, {key: torch.ones(1)})
    with pytest.raises(ValueError, match="a module on the meta device can't hold"):
        point_rend.load_official(head().to("meta"), {k: to_tensor(v) for k, v in arrays().items()})


def test_sparse_network_without_dropout_in_its_numbers() -> None:
    """Some versions of the official sparse network count dropout among the prediction's layers, others don't."""
    theirs = official.randomize(official.Net("points", 6, 5, 8, 4)).double()
    state = {key.replace("prediction.3.", "prediction.2."): value for key, value in theirs.state_dict().items()}
    assert any(key.startswith("prediction.2.") for key in state)
    same = [DeepGCN(6, 5, channels=8, blocks=4).double() for _ in range(2)]
    for module, keys in zip(same, (theirs.state_dict(), state), strict=True):
        deep_gcn.load_official(module, keys)
    for a, b in zip(*(module.state_dict().values() for module in same), strict=True):
        assert torch.equal(a, b)
