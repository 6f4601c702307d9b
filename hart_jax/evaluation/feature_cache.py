"""Features of many images: over all devices, shared between processes, kept in chunks so that a run goes on.

A chunk is the rows of `CHUNK` consecutive images, one file; a run that was interrupted, or another that asks for the
same of the same images, computes only what is missing.
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
from hart_jax.config.scales import Scale
from hart_jax.errors import UserError
from hart_jax.evaluation.images import ImageSet, decode
from hart_jax.io.files import atomic_file
from hart_jax.io.paths import make_folder
from hart_jax.parallel.mesh import MeshLayout, make_mesh
from hart_jax.parallel.program import Program
from hart_jax.parallel.rules import RULES

CHUNK = 500
Columns = dict[str, np.ndarray]


class FeatureRows(NamedTuple):
    """This process's rows: their places among all images, ascending, and of each column one row for an image."""

    places_N: np.ndarray
    columns: Columns


class DataParallel:
    """A function of parameters and images (uint8 BHWC), on all devices of this process; gives columns (B, ...)."""

    def __init__(self, name: str, function: Callable[[Any, jax.Array], Mapping[str, jax.Array]], params: Any):
        layout = MeshLayout(make_mesh(MeshConfig(), 0, jax.local_devices()), RULES)
        self.shards, self._split = layout.batch_shards, layout.batch
        self._function = row_program(name, function, layout)
        self._params = jax.device_put(params, layout.replicated)

    def __call__(self, images_BHWC: np.ndarray) -> Columns:
        return jax.device_get(self._function(self._params, jax.device_put(images_BHWC, self._split)))


def row_program(name: str, function: Callable[[Any, jax.Array], Any], layout: MeshLayout) -> Program:
    """What a `DataParallel` calls."""
    return Program(name, function, layout, out_shardings=layout.batch)


def compute_features(
    image_set: ImageSet,
    size: Scale,
    compute: DataParallel,
    folder: Path | None,
    *,
    batch_size: int = 32,
    title: str = "images",
) -> FeatureRows:
    """What `compute` gives of the images at `size` px (0: as they are), in this process's share of the chunks.

    Args:
      folder: keeps the chunks; its name must say all that the rows depend on. None keeps none; a chunk that is
        damaged is computed again, one that cannot be written is left out, both of which stderr says.
      batch_size: of this process; made a multiple of its devices. No result depends on it.

    Raises:
      UserError: an image does not decode, or images kept as they are differ in size.
    """
    count, processes = len(image_set.infos), jax.process_count()
    batch_size = -(-min(batch_size, count) // compute.shards) * compute.shards
    starts = range(jax.process_index() * CHUNK, count, processes * CHUNK)
    shares = [range(start, min(start + CHUNK, count)) for start in starts]
    kept = [_read(_chunk_path(folder, share), len(share)) if folder else None for share in shares]
    missing = sum(len(share) for share, chunk in zip(shares, kept, strict=True) if chunk is None)
    loaded: list[Columns] = []
    with tqdm(total=missing, unit="image", desc=title, disable=not missing) as bar:
        for share, chunk in zip(shares, kept, strict=True):
            loaded.append(_compute(image_set, share, size, compute, batch_size, bar) if chunk is None else chunk)
            if folder and chunk is None:
                _write(_chunk_path(folder, share), loaded[-1])
    places = np.concatenate([np.arange(share.start, share.stop) for share in shares] or [np.zeros(0, int)])
    # A process without a share still says which columns there are.
    examples = loaded or [{name: array[:0] for name, array in _example(image_set, size, compute).items()}]
    return FeatureRows(places, {name: np.concatenate([chunk[name] for chunk in examples]) for name in examples[0]})


def _compute(
    image_set: ImageSet, share: range, size: Scale, compute: DataParallel, batch_size: int, bar: tqdm
) -> Columns:
    batches = [
        range(start, min(start + batch_size, share.stop)) for start in range(share.start, share.stop, batch_size)
    ]
    found: list[Columns] = []
    for batch, images in zip(batches, _decoded(image_set, batches, size), strict=True):
        padded = np.concatenate([images, np.repeat(images[:1], batch_size - len(batch), axis=0)])
        found.append({name: array[: len(batch)] for name, array in compute(padded).items()})
        bar.update(len(batch))
    return {name: np.concatenate([columns[name] for columns in found]) for name in found[0]}


def _example(image_set: ImageSet, size: Scale, compute: DataParallel) -> Columns:
    (images,) = _decoded(image_set, [range(1)], size)
    return compute(np.repeat(images, compute.shards, axis=0))


def _decoded(image_set: ImageSet, batches: Sequence[range], size: Scale) -> Iterator[np.ndarray]:
    """The images of each batch, the next one's on their way."""
    first = decode(image_set.read(0), size, image_set.infos[0].name)

    def read(index: int) -> np.ndarray:
        name = image_set.infos[index].name
        image = decode(image_set.read(index), size, name)
        if image.shape != first.shape:
            sizes = " and ".join(f"{width}x{height}" for height, width, _ in (image.shape, first.shape))
            names = f"{name} and {image_set.infos[0].name}"
            raise UserError(f"images {names} differ in size ({sizes}); give --image_size to make squares of all")
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


def _chunk_path(folder: Path, share: range) -> Path:
    return folder / f"{share.start:08d}-{len(share)}.npz"


def _write(path: Path, columns: Columns) -> None:
    try:
        make_folder(path.parent)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **columns)  # type: ignore[arg-type]
    except OSError as error:
        _warn(f"{path}: cannot be written ({error}); the next evaluation computes it again")


def _read(path: Path, count: int) -> Columns | None:
    """The columns that a chunk keeps, of so many rows; None where it is missing or damaged."""
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
