"""Tensors of a released checkpoint file, by name: safetensors, PyTorch pickles, and checkpoints in several files."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from hart_jax.config import read_json
from hart_jax.convert.torch_files import read_torch
from hart_jax.errors import UserError


def open_tensors(path: Path) -> Mapping[str, np.ndarray]:
    """The tensors of `path`: `.safetensors`, a `.bin`, `.pth` or `.pt` of torch.save, or an `.index.json` of several.

    Tensors are read one at a time as they are asked for, so that no second copy of a model lies in memory. Floating
    ones of torch.save come as float32.

    Raises:
      UserError: a file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    return _TorchFile(path) if path.suffix in (".bin", ".pth", ".pt") else _SafetensorsFile(path)


class _SafetensorsFile(Mapping[str, np.ndarray]):
    def __init__(self, path: Path):
        self._path = path
        try:
            self._file = safe_open(path, framework="numpy")
            self._names = frozenset(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cut short or not a safetensors file ({error})") from error

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise UserError(f"{self._path}: tensor {name!r} cannot be read ({error})") from error

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


class _TorchFile(Mapping[str, np.ndarray]):
    def __init__(self, path: Path):
        self._tensors = read_torch(path)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        is_float = tensor.dtype == ml_dtypes.bfloat16 or tensor.dtype.kind == "f"
        return tensor.astype(np.float32, copy=False) if is_float else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Shards(Mapping[str, np.ndarray]):
    def __init__(self, file_of: dict[str, Mapping[str, np.ndarray]]):
        self._file_of = file_of

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _open_index(path: Path) -> Mapping[str, np.ndarray]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{path}: no weight_map, which says the file of every tensor")
    files = {name: open_tensors(path.parent / name) for name in sorted(set(weight_map.values()))}
    listed = {name: files[file] for name, file in weight_map.items()}
    unlisted = {name: file for file in files.values() for name in file if name not in listed}
    absent = [name for name, file in listed.items() if name not in file]
    if absent:
        raise UserError(f"{path}: tensor {absent[0]!r} is not in its file {weight_map[absent[0]]}")
    return _Shards(listed | unlisted)
