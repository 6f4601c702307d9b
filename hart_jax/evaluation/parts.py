"""Rows computed of many pictures: over all devices, shared between processes, kept in parts so that a run goes on.

A part is the rows of `PART` consecutive pictures, one file; a run that was interrupted, or another that asks for the
same of the same pictures, computes only what is missing.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from hart_jax.config import MeshConfig
from hart_jax.errors import UserError
from hart_jax.evaluation.pictures import Pictures, decode
from hart_jax.io.files import whole_file
from hart_jax.io.paths import make_folder
from hart_jax.parallel.mesh import Placement, make_mesh
from hart_jax.parallel.program import Program
from hart_jax.parallel.rules import RULES

PART = 500
Columns = dict[str, np.ndarray]


class Rows(NamedTuple):
    """This process's rows: their places among all pictures, ascending, and of each column one row for a picture."""

    places_N: np.ndarray
    columns: Columns


class Compiled:
    """A function of parameters and pictures (uint8 BHWC), on all devices of this process; gives columns (B, ...)."""

    def __init__(self, name: str, function: Callable[[Any, jax.Array], Mapping[str, jax.Array]], params: Any):
        placement = Placement(make_mesh(MeshConfig(), 0, jax.local_devices()), RULES)
        self.parts, self._split = placement.batch_parts, placement.batch
        self._function = row_program(name, function, placement)
        self._params = jax.device_put(params, placement.whole)

    def __call__(self, images_BHWC: np.ndarray) -> Columns:
        return jax.device_get(self._function(self._params, jax.device_put(images_BHWC, self._split)))


def row_program(name: str, function: Callable[[Any, jax.Array], Any], placement: Placement) -> Program:
    """What a `Compiled` calls."""
    return Program(name, function, placement, out_shardings=placement.batch)


def rows_of(
    pictures: Pictures,
    size: int,
    compute: Compiled,
    folder: Path | None,
    *,
    batch_size: int = 32,
    title: str = "pictures",
) -> Rows:
    """What `compute` gives of the pictures at `size` px (0: as they are), in this process's share of the parts.

    Args:
      folder: keeps the parts; its name must say all that the rows depend on. None keeps none; a part that is damaged
        is computed again, one that cannot be written is left out, both of which stderr says.
      batch_size: of this process; made a multiple of its devices. No result depends on it.

    Raises:
      UserError: a picture does not decode, or pictures kept as they are differ in size.
    """
    count, processes = len(pictures.abouts), jax.process_count()
    batch_size = -(-min(batch_size, count) // compute.parts) * compute.parts
    starts = range(jax.process_index() * PART, count, processes * PART)
    shares = [range(start, min(start + PART, count)) for start in starts]
    kept = [_read(_part(folder, share), len(share)) if folder else None for share in shares]
    missing = sum(len(share) for share, part in zip(shares, kept, strict=True) if part is None)
    loaded: list[Columns] = []
    with tqdm(total=missing, unit="picture", desc=title, disable=not missing) as bar:
        for share, part in zip(shares, kept, strict=True):
            loaded.append(_compute(pictures, share, size, compute, batch_size, bar) if part is None else part)
            if folder and part is None:
                _write(_part(folder, share), loaded[-1])
    places = np.concatenate([np.arange(share.start, share.stop) for share in shares] or [np.zeros(0, int)])
    # A process without a share still says which columns there are.
    examples = loaded or [{name: array[:0] for name, array in _example(pictures, size, compute).items()}]
    return Rows(places, {name: np.concatenate([part[name] for part in examples]) for name in examples[0]})


def _compute(pictures: Pictures, share: range, size: int, compute: Compiled, batch_size: int, bar: tqdm) -> Columns:
    batches = [
        range(start, min(start + batch_size, share.stop)) for start in range(share.start, share.stop, batch_size)
    ]
    found: list[Columns] = []
    for batch, images in zip(batches, _decoded(pictures, batches, size), strict=True):
        padded = np.concatenate([images, np.repeat(images[:1], batch_size - len(batch), axis=0)])
        found.append({name: array[: len(batch)] for name, array in compute(padded).items()})
        bar.update(len(batch))
    return {name: np.concatenate([columns[name] for columns in found]) for name in found[0]}


def _example(pictures: Pictures, size: int, compute: Compiled) -> Columns:
    (images,) = _decoded(pictures, [range(1)], size)
    return compute(np.repeat(images, compute.parts, axis=0))


def _decoded(pictures: Pictures, batches: Sequence[range], size: int) -> Iterator[np.ndarray]:
    """The pictures of each batch, the next one's on their way."""
    first = decode(pictures.read(0), size, pictures.abouts[0].name)

    def read(index: int) -> np.ndarray:
        name = pictures.abouts[index].name
        image = decode(pictures.read(index), size, name)
        if image.shape != first.shape:
            sizes = " and ".join(f"{width}x{height}" for height, width, _ in (image.shape, first.shape))
            names = f"{name} and {pictures.abouts[0].name}"
            raise UserError(f"pictures {names} differ in size ({sizes}); give --image_size to make squares of all")
        return image

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: list[list[Future[np.ndarray]]] = []
        try:
            for batch in [*batches, None]:
                if batch is not None:
                    waiting.append([pool.submit(read, index) for index in batch])
                if len(waiting) > 1 or (batch is None and waiting):
                    yield np.stack([future.result() for future in waiting.pop(0)])
        finally:
            pool.shutdown(cancel_futures=True)


def _part(folder: Path, share: range) -> Path:
    return folder / f"{share.start:08d}-{len(share)}.npz"


def _write(path: Path, columns: Columns) -> None:
    try:
        make_folder(path.parent)
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **columns)  # type: ignore[arg-type]
    except OSError as error:
        _warn(f"{path}: cannot be written ({error}); the next evaluation computes it again")


def _read(path: Path, count: int) -> Columns | None:
    """The columns that a part keeps, of so many rows; None where it is missing or damaged."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        if not columns or any(column.shape[:1] != (count,) for column in columns.values()):
            raise ValueError("it has other rows")
        return columns
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy and zipfile raise all kinds
        _warn(f"{path}: damaged ({error}); it is computed again")
        return None


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
