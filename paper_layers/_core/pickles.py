"""Read checkpoint files with NumPy arrays without running anything in them.

A pickle names functions, with their arguments, for whoever reads it to call. Here the few names that arrays are made of
mean stand-ins of this file, and all others are refused. So neither NumPy nor anything else is called.
"""

from __future__ import annotations

import math
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "b1": torch.bool, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64,
    "u1": torch.uint8, "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64,
    "f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "c8": torch.complex64, "c16": torch.complex128,
}  # fmt: skip


class Array:
    """A NumPy array or number as a pickle stores it."""

    shape: Any = ()
    dtype: Any = None
    columns_first: Any = False
    data: Any = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, self.shape, self.dtype, self.columns_first, self.data = state

    def tensor(self) -> Tensor:
        """Return the array as a tensor."""
        code, order = self.dtype.code, self.dtype.order
        if code not in _DTYPES:
            raise ValueError(f"an array of NumPy's dtype {code!r}")
        # Python 2 has one type for bytes and text.
        data = self.data.encode("latin1") if isinstance(self.data, str) else bytes(self.data)
        dtype = _DTYPES[code]
        if len(data) != math.prod(self.shape) * dtype.itemsize:
            raise ValueError(f"an array of shape {self.shape} with {len(data)} bytes")
        if not data:
            return torch.empty(self.shape, dtype=dtype)
        values = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if order == (">" if sys.byteorder == "little" else "<"):
            values = values.view(-1, dtype.itemsize // (2 if dtype.is_complex else 1)).flip(1).flatten()
        values = values.view(dtype)
        if self.columns_first:
            return values.view(self.shape[::-1]).permute(*reversed(range(len(self.shape))))
        return values.view(self.shape)


def is_array(value: Any) -> bool:
    """Return whether `to_tensor` takes the value."""
    numpy = sys.modules.get("numpy")
    return isinstance(value, Tensor | Array) or (numpy is not None and isinstance(value, numpy.ndarray | numpy.number))


def to_tensor(value: Any) -> Tensor:
    """Return a tensor, or a NumPy or pickled array as a tensor."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Array):
        return value.tensor()
    if value.dtype.str[1:] not in _DTYPES:
        raise ValueError(f"an array of NumPy's dtype {value.dtype.str[1:]!r}")
    # torch takes neither negative strides nor the other byte order, and warns of memory that is not to be written.
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C").reshape(value.shape))


def read(path: str | os.PathLike[str]) -> Any:
    """Return the content of a file that torch.save or pickle wrote: tensors, arrays, numbers, strings, containers.

    Raises:
        pickle.UnpicklingError: There is anything else in it, or it is neither.
    """
    try:
        return _read(path)
    except (OSError, pickle.UnpicklingError):
        raise
    except Exception as error:
        raise pickle.UnpicklingError(
            f"state_dict: expected a file of torch.save's or of pickle's, got {type(error).__name__}: {error}"
        ) from error


def _read(path: str | os.PathLike[str]) -> Any:
    stand_ins = _stand_ins()
    if not zipfile.is_zipfile(path):
        content = _unpickle(path, stand_ins)
        if content != torch.serialization.MAGIC_NUMBER:  # With which old files of torch.save begin.
            return content
    with torch.serialization.safe_globals([(value, name) for name, value in stand_ins.items()]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _unpickle(path: str | os.PathLike[str], stand_ins: dict[str, Any]) -> Any:
    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" not in allowed:
                raise pickle.UnpicklingError(f"state_dict: expected tensors, arrays and numbers, got {module}.{name}")
            return allowed[f"{module}.{name}"]

    allowed = {"collections.OrderedDict": OrderedDict, **stand_ins}
    allowed |= {
        f"{module}.{kind.__name__}": kind for kind in (set, frozenset) for module in ("builtins", "__builtin__")
    }
    with open(path, "rb") as file:
        return Unpickler(file, encoding="latin1").load()


def _stand_ins() -> dict[str, Any]:
    """Return stand-ins by NumPy's names, new for each file, as a pickle can set attributes of what it names."""

    class Dtype:
        order = "|"

        def __init__(self, code: str, *_: Any):
            self.code = str(code).lstrip("<>|=")

        def __setstate__(self, state: tuple[Any, ...]) -> None:
            self.order = state[1]

    class Made(Array):
        pass

    def reconstruct(kind: Any, *_: Any) -> Array:
        if kind is not Made:
            raise pickle.UnpicklingError(f"state_dict: expected an array, got {kind}")
        return Made()

    def from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> Array:
        array = Made()
        array.__setstate__((shape, dtype, order == "F", data))
        return array

    def scalar(dtype: Any, data: Any = b"") -> Array:
        return from_buffer(data, dtype, (), "C")

    def encode(text: str, encoding: str) -> bytes:
        """Decode bytes as old protocols write them."""
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"state_dict: expected bytes in latin1, got {encoding}")
        return text.encode("latin1")

    def empty(data: bytes = b"") -> bytes:
        """Return None, which old protocols write as a call; a number would allocate that much memory."""
        return bytes(memoryview(data))

    names = {"numpy.dtype": Dtype, "numpy.ndarray": Made, "_codecs.encode": encode}
    names |= {f"{module}.{kind}": empty for kind in ("bytes", "bytearray") for module in ("builtins", "__builtin__")}
    for core in ("numpy.core", "numpy._core"):
        names |= {f"{core}.multiarray._reconstruct": reconstruct, f"{core}.multiarray.scalar": scalar}
        names[f"{core}.numeric._frombuffer"] = from_buffer
    return names
