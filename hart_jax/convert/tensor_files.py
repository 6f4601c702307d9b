"""Tensors of a released checkpoint file, by name: safetensors, PyTorch pickles, and checkpoints in several files."""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from hart_jax.config import read_json
from hart_jax.errors import UserError


def open_tensors(path: Path) -> Mapping[str, np.ndarray]:
    """The tensors of `path`: `.safetensors`, a `.bin`, `.pth` or `.pt` of torch.save, or an `.index.json` of several.

    Safetensors are read one at a time as they are asked for, so that no second copy of a model lies in memory.

    Raises:
      UserError: a file is missing, damaged or of another kind, or it is of torch.save and PyTorch is not installed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    return _open_pickle(path) if path.suffix in (".bin", ".pth", ".pt") else _SafetensorsFile(path)


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


def _open_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: reading it needs PyTorch, which is not installed; run `pip install torch` (the extra "
            f"hart_jax[torch]), or use the safetensors file beside it if there is one (--weights=model)"
        ) from None
    try:
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: damaged, or holds more than tensors ({reason})") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{path}: not a plain state dict, which has a tensor for every name")
    # Shares memory with the float32 tensors; numpy has no half-precision types that torch hands out.
    return {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in tensors.items()}


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
