"""Tensors of a released checkpoint file, by name: safetensors, PyTorch pickles, and checkpoints in several files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from hart_jax.errors import UserError
from hart_jax.io.files import check_readable, read_json
from hart_jax.io.safetensors import check_finite
from hart_jax.io.torch_files import read_torch

# Which of a part's weights: the exponential moving average of training, or those it was computed from.
Weights = Literal["ema", "model"]
_FILES = {
    "ema": ("ema_model.safetensors", "ema_model.safetensors.index.json", "ema_model.bin"),
    "model": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
}
# Names that DistributedDataParallel and torch.compile put before those of what they wrap.
_WRAPPERS = ("module.", "_orig_mod.")


def weight_file(part: Path, weights: Weights = "ema") -> Path:
    """The file of a part's weights; the EMA's if `weights` is "ema" and there is one.

    Raises:
      UserError: there is none.
    """
    names = (_FILES["ema"] if weights == "ema" else ()) + _FILES["model"]
    for name in names:
        if (part / name).is_file():
            return part / name
    raise UserError(f"{part}: no weight file; looked for {', '.join(names)}")


def open_tensors(path: Path) -> Mapping[str, np.ndarray]:
    """The tensors of `path`: `.safetensors`, a `.bin`, `.pth` or `.pt` of torch.save, or an `.index.json` of several.

    Tensors are read one at a time as they are asked for, so that no second copy of a model lies in memory. Floating
    ones of torch.save come as float32.

    A prefix that a wrapper in training has put before every name (`module.`, `_orig_mod.`) is left out.

    Raises:
      UserError: a file is missing, damaged or of another kind; of a tensor, when it is asked for, that cannot be read
        or has values that are not finite.
    """
    check_readable(path, "weight file")
    if path.name.endswith(".index.json"):
        return _unwrapped(_open_index(path))
    return _unwrapped(_open_file(path))


def _open_file(path: Path) -> Mapping[str, np.ndarray]:
    check_readable(path, "weight file")
    return _TorchFile(path) if path.suffix in (".bin", ".pth", ".pt") else _SafetensorsFile(path)


def _unwrapped(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    prefix = ""
    while more := next((one for one in _WRAPPERS if all(name.startswith(prefix + one) for name in tensors)), ""):
        if not tensors:
            break
        prefix += more
    return _Unwrapped(tensors, prefix) if prefix else tensors


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
            tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self._path}: tensor {name!r} cannot be read ({error})") from error
        check_finite(tensor, f"{self._path}: tensor {name!r}")
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


class _TorchFile(Mapping[str, np.ndarray]):
    def __init__(self, path: Path):
        self._path, self._tensors = path, read_torch(path)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        check_finite(tensor, f"{self._path}: tensor {name!r}")
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


class _Unwrapped(Mapping[str, np.ndarray]):
    def __init__(self, tensors: Mapping[str, np.ndarray], prefix: str):
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_weight_map(path: Path) -> dict[str, str]:
    """The file of every tensor, as an index says it: plain names of files beside it.

    Raises:
      UserError: it says something else.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{path}: no weight_map, which says the file of every tensor")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or name == ".." or name.endswith(".index.json"):
            raise UserError(f"{path}: tensor {tensor!r} is said to be in {name!r}, which is no weight file beside it")
    return weight_map


def _open_index(path: Path) -> Mapping[str, np.ndarray]:
    weight_map = read_weight_map(path)
    files = {name: _open_file(path.parent / name) for name in sorted(set(weight_map.values()))}
    listed = {name: files[file] for name, file in weight_map.items()}
    unlisted = {name: file for file in files.values() for name in file if name not in listed}
    absent = [name for name, file in listed.items() if name not in file]
    if absent:
        raise UserError(f"{path}: tensor {absent[0]!r} is not in its file {weight_map[absent[0]]}")
    return _Shards(listed | unlisted)
