"""Parameters in one safetensors file, as float32, bfloat16 or int8: the weight files of a model folder.

A nested dict of arrays is stored flat, its names joined by "/". In an int8 file a matrix `name` is int8 and stands
beside its float32 scales `name.int8_scale`, as `hart_jax.io.int8_scheme` has them; all else is float32. Files of before
had scales along other axes; they are read by the shapes of their scales.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hart_jax.errors import UserError
from hart_jax.io.files import atomic_file, check_readable
from hart_jax.io.int8_scheme import quantize_matrix, shared_axes

DTYPES = ("float32", "bfloat16", "int8")
_SCALE_SUFFIX = ".int8_scale"
_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}
_TYPES |= {f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}


def save_weights(path: str | os.PathLike[str], params: Mapping[str, Any], *, dtype: str = "float32") -> None:
    """Writes `params` (a nested dict of arrays, Flax boxes allowed) to `path`, replacing it whole or not at all.

    Args:
      path: the file to write; its folder is made where it is missing.
      params: nested dict of numpy or JAX arrays; integer arrays keep their type.
      dtype: "float32" and "bfloat16" convert every floating array. "int8" stores matrices as int8 with scales, and all
        else (norms, biases, codebooks) as float32.

    Raises:
      UserError: `dtype` is none of these, or a matrix of an int8 file is not finite.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} of the weight file {path} is unknown; choose one of {', '.join(DTYPES)}")
    tensors: dict[str, np.ndarray] = {}
    for name, value in _flat(params).items():
        array = np.asarray(value)
        if not _is_float(array):
            tensors[name] = array
        elif dtype == "int8" and shared_axes(name, array.ndim):
            small = quantize_matrix(array.astype(np.float32), name, name)
            tensors[name], tensors[name + _SCALE_SUFFIX] = np.asarray(small.values), np.asarray(small.scales)
        else:
            tensors[name] = array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32, copy=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        _write_safetensors(file, tensors)


def load_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The nested dict that `save_weights` stored; every floating array as float32, whatever the file's type.

    Raises:
      UserError: the file is missing, cut short, or not safetensors.
    """
    tensors = read_tensors(path)
    flat: dict[str, Any] = {}
    for name, array in tensors.items():
        if name.endswith(_SCALE_SUFFIX):
            continue
        value = array.astype(np.float32, copy=False) if _is_float(array) else array
        if name + _SCALE_SUFFIX in tensors:
            value = array * tensors[name + _SCALE_SUFFIX]
        flat[name] = value
    return unflatten_dict(flat, sep="/")


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Any safetensors file as it is: flat names, stored types (bfloat16 from ml_dtypes).

    Raises:
      UserError: the file is missing, cut short, or not safetensors.
    """
    check_readable(path, "weight file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"weight file {path} is cut short or not a safetensors file ({error})") from error


def map_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """As `load_weights` of a float32 file, whose arrays stay on disk, read only, until they are used.

    Raises:
      UserError: the file is missing, cut short, not safetensors, or not of float32.
    """
    check_readable(path, "weight file")
    try:
        with Path(path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            begin, end = 8 + size, os.fstat(file.fileno()).st_size
        spans = {name: entry["data_offsets"] for name, entry in header.items()}
        if begin + max(stop for _, stop in spans.values()) != end:
            raise ValueError(f"it has {end} bytes")
        if any(entry["dtype"] != "F32" for entry in header.values()):
            raise ValueError("not all of it is float32")
        arrays = {
            name: np.memmap(path, np.float32, "r", begin + spans[name][0], tuple(entry["shape"]))
            for name, entry in header.items()
        }
        return unflatten_dict(arrays, sep="/")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise UserError(f"weight file {path} is cut short or not a safetensors file of float32 ({error})") from error


def check_tree(loaded: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Checks that `loaded` has exactly the names and shapes of `expected` (e.g. the output of `jax.eval_shape`), and no
    number that is not finite (0.05 s a GiB).

    Args:
      loaded: nested dict of arrays, or of anything with a `shape`, whose numbers are then not looked at.
      expected: nested dict of anything with a `shape`, Flax boxes allowed.
      what: what is being checked, for the message, e.g. "transformer weights in model/transformer".

    Raises:
      UserError: names the first few missing, unexpected and mis-shaped arrays, or the first with such a number.
    """
    have = {name: tuple(value.shape) for name, value in _flat(loaded).items()}
    want = {name: tuple(value.shape) for name, value in _flat(expected).items()}
    missing = [name for name in want if name not in have]
    unexpected = [name for name in have if name not in want]
    differing = [name for name in want if name in have and have[name] != want[name]]
    shaped = [f"{name} {have[name]} instead of {want[name]}" for name in differing]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shaped))
        if names
    ]
    if problems:
        raise UserError(f"{what}: checkpoint of another model: {'; '.join(problems)}; check that the config is its own")
    for name, value in _flat(loaded).items():
        check_finite(value, f"{what}: array {name}")


def check_finite(array: Any, what: str) -> None:
    """Raises `UserError`, beginning with `what`, where an array of NumPy or JAX holds NaN or an infinity."""
    if isinstance(array, jax.Array) and array.is_fully_addressable and jnp.issubdtype(array.dtype, jnp.floating):
        ok = bool(jnp.isfinite(array).all())
    elif isinstance(array, np.ndarray) and array.dtype == ml_dtypes.bfloat16:
        ok = not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    elif isinstance(array, np.ndarray) and _is_float(array):
        with np.errstate(over="ignore", invalid="ignore"):
            # What is not finite makes the sum so; a sum may also be too large for its type.
            ok = bool(np.isfinite(array.sum()) or np.isfinite(array).all())
    else:
        ok = True
    if not ok:
        raise UserError(f"{what} has values that are not finite: the file is damaged, or its training had diverged")


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flatten_dict(nn.meta.unbox(tree), sep="/")


def _is_float(array: np.ndarray) -> bool:
    # numpy's own kinds do not cover bfloat16.
    return array.dtype == ml_dtypes.bfloat16 or bool(np.issubdtype(array.dtype, np.floating))


def _write_safetensors(file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
    """As `safetensors.numpy.save_file`, which keeps two more copies of everything in memory; here, of one array."""
    # Wide types first, so that each array is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, end = {}, 0
    for name in names:
        array = tensors[name]
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _TYPES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        # In C order, whatever view it is.
        file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
