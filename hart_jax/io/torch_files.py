"""State dicts written by torch.save, read without PyTorch and without running what the file says.

Two formats exist. Since PyTorch 1.6 it is a zip archive, whose data.pkl describes the tensors, and each of whose files
data/KEY is a storage. Before (and on request) it is five pickles, of a magic number, a version, the writer's machine,
the tensors and the storages' keys, and then the storages, each behind its length, always in little-endian order. A
storage may serve several tensors.
"""

import math
import operator
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

from hart_jax.errors import UserError
from hart_jax.io.archives import check_unpacked

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class _Storage(NamedTuple):
    """Where a tensor's numbers are: from number `start` of the bytes under `key`; `kind` is one of _DTYPES."""

    kind: str
    key: str
    start: int


class _Tensor(NamedTuple):
    """A tensor as its pickle describes it; offset and strides count numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict, of its types, bfloat16 from ml_dtypes.

    The arrays are read only and lie in the file, which is mapped into memory: what is not used is not read, and tensors
    that share a storage share memory.

    Raises:
      UserError: the file is missing, damaged, not of torch.save, or holds anything but named tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    try:
        bytes_N = np.asarray(np.memmap(path, np.uint8, "r"))
        with path.open("rb") as file:
            zipped = bytes_N[:4].tobytes() == b"PK\x03\x04"
            described, storages = _read_zip(file, bytes_N) if zipped else _read_pickles(file, bytes_N)
        if not isinstance(described, Mapping):
            raise UserError(f"{path}: not a plain state dict, which has a tensor for every name")
        for name, value in described.items():
            if not isinstance(name, str) or not isinstance(value, _Tensor):
                raise UserError(
                    f"{path}: not a plain state dict, which has a tensor for every name; its {name!r} is of another "
                    "kind, so save with torch.save what a model's state_dict() gives"
                )
        return {name: _array(tensor, storages) for name, tensor in described.items()}
    except UserError:
        raise
    except Exception as error:  # a damaged or doctored pickle raises whatever its instructions run into
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(f"{path}: damaged, or holds more than tensors ({reason})") from error


class _Unpickler(pickle.Unpickler):
    """Admits tensors and nothing else, so that a doctored file cannot run code.

    Tensors come out as `_Tensor`. Storages' types come out as their names, since a pickle could set an object's state.
    """

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="utf-8")
        self.storage_kinds: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        what, kind, key, _, _, *view = pid
        if what != "storage" or kind not in _DTYPES:
            raise pickle.UnpicklingError(f"it refers to {pid!r}, which is no storage")
        self.storage_kinds[key] = kind
        # Old files have storages that are parts of others: (own key, start, length), or None.
        start = view[0][1] if view and view[0] else 0
        return _Storage(kind, key, start)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _read_zip(file: IO[bytes], bytes_N: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """What data.pkl describes, and the storages' numbers by key."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        data = next((name for name in names if name.endswith("/data.pkl")), None)
        if data is None:
            raise ValueError("a zip archive without data.pkl")
        root = data.removesuffix("data.pkl")
        with archive.open(data) as pickled:
            unpickler = _Unpickler(pickled)
            described = unpickler.load()
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in names else "little"
        storages = {
            key: _numbers(_member(archive, f"{root}data/{key}", bytes_N), kind, order)
            for key, kind in unpickler.storage_kinds.items()
        }
    return described, storages


def _member(archive: zipfile.ZipFile, name: str, bytes_N: np.ndarray) -> np.ndarray:
    """The bytes of a file in the archive, in place; torch.save does not compress."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        check_unpacked(str(archive.filename), [info.file_size])
        return np.frombuffer(archive.read(info), np.uint8)
    with archive.open(info):  # checks the local header
        header = bytes_N[info.header_offset : info.header_offset + 30].tobytes()
    start = info.header_offset + 30 + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    if start + info.file_size > len(bytes_N):
        raise ValueError(f"{name} is cut short")
    return bytes_N[start : start + info.file_size]


def _read_pickles(file: IO[bytes], bytes_N: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """The same of the older format."""
    try:
        magic = _Unpickler(file).load()
    except Exception:
        magic = None
    if magic != _MAGIC or _Unpickler(file).load() != _VERSION:
        raise ValueError("not a file of torch.save")
    _Unpickler(file).load()
    unpickler = _Unpickler(file)
    described = unpickler.load()
    storages = {}
    keys, at = _Unpickler(file).load(), file.tell()
    for key in keys:
        kind, begin = unpickler.storage_kinds[key], at + 8
        at = begin + int.from_bytes(bytes_N[at:begin].tobytes(), "little") * _DTYPES[kind].itemsize
        if at > len(bytes_N):
            raise ValueError(f"storage {key} is cut short")
        storages[key] = _numbers(bytes_N[begin:at], kind, "little")
    return described, storages


def _numbers(bytes_N: np.ndarray, kind: str, order: str) -> np.ndarray:
    dtype = _DTYPES[kind]
    if order != sys.byteorder:
        # ml_dtypes' types have one byte order only.
        return bytes_N.view(f"u{dtype.itemsize}").byteswap().view(dtype)
    return bytes_N.view(dtype)


def _array(tensor: _Tensor, storages: Mapping[str, np.ndarray]) -> np.ndarray:
    """The view of its storage that a tensor is; ValueError where it is not within the storage."""
    numbers_N = storages[tensor.storage.key]
    begin = operator.index(tensor.storage.start) + operator.index(tensor.offset)
    shape, strides = (tuple(map(operator.index, value)) for value in (tensor.shape, tensor.strides))
    if len(shape) != len(strides) or min((begin, *shape, *strides)) < 0:
        raise ValueError(f"a tensor at {begin} of shape {shape} and strides {strides}")
    steps = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and begin + steps >= len(numbers_N):
        raise ValueError(f"a tensor of shape {shape} beyond its storage of {len(numbers_N)} numbers")
    step = numbers_N.itemsize
    return as_strided(numbers_N[begin:], shape, [stride * step for stride in strides], writeable=False)
