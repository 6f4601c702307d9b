"""Arrays on disk that are computed once: whole or not there, and never a signal where the disk is full.

Files are written from start to end. Writing into a memory map of a file with holes would end the program with SIGBUS
when the disk is full.
"""

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

import numpy as np

from hart_jax.errors import UserError
from hart_jax.io.files import atomic_folder

T = TypeVar("T")


class Write(Protocol):
    def __call__(self, **columns: np.ndarray) -> None:
        """Appends rows to columns, by name: arrays (n, ...), n the same for all."""
        ...


def open_cache(folder: Path, open_cached: Callable[[Path], T], what: str) -> T | None:
    """The cache in `folder`; None where it is not there, or with a warning where it is damaged.

    Args:
      open_cached: raises `FileNotFoundError` or another error accordingly.
      what: name of the cache, for the warning.
    """
    try:
        return open_cached(folder)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        print(f"warning: the {what} in {folder} are damaged and made again ({error})", file=sys.stderr)
        return None


@contextlib.contextmanager
def new_cache(folder: Path, count: int) -> Iterator[tuple[Path, Write]]:
    """Gives a folder to write files into, and a function that appends to columns of `count` rows, `<name>.npy` there.

    It becomes `folder`, in place of what may be there, when all is written; where anything is raised, nothing of it is
    left. One process at a time may do so for a folder.

    Raises:
      UserError: the disk is full, or the folder cannot be written to.
    """
    columns: dict[str, BinaryIO] = {}

    def write(**rows: np.ndarray) -> None:
        for name, values in rows.items():
            if name not in columns:
                columns[name] = (new / f"{name}.npy").open("wb")
                header = {"descr": values.dtype.str, "fortran_order": False, "shape": (count, *values.shape[1:])}
                np.lib.format.write_array_header_1_0(columns[name], header)
            columns[name].write(np.ascontiguousarray(values).data)

    try:
        for left in folder.parent.glob(f".{folder.name}.*"):
            # By a run that was killed.
            shutil.rmtree(left, ignore_errors=True)
        with atomic_folder(folder) as new:
            yield new, write
            for file in columns.values():
                file.close()
            if folder.is_dir():
                shutil.rmtree(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); free space, and start again"
        ) from error
    finally:
        for file in columns.values():
            with contextlib.suppress(OSError):
                file.close()


def read_column(path: Path, count: int, in_memory: bool = False) -> np.ndarray:
    """A column of so many rows, mapped unless it is to lie in memory.

    Raises:
      FileNotFoundError: it is not there.
      ValueError, EOFError: it is damaged.
    """
    column = np.load(path, mmap_mode=None if in_memory else "r")
    if column.ndim < 1 or len(column) != count:
        raise ValueError(f"{path.name} has shape {column.shape}, not {count} rows")
    return column


def fitting(values: np.ndarray, dtype: np.dtype | type, what: str) -> np.ndarray:
    """Values in a narrower type.

    Raises:
      UserError: some are outside its range, or not finite.
    """
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype)
    if np.issubdtype(narrow.dtype, np.floating):
        if not np.isfinite(narrow).all():
            largest = np.abs(values).max()
            raise UserError(f"{what}: values up to {largest:g} do not fit {narrow.dtype}; do not compute them ahead")
    elif values.size and (values.min() < np.iinfo(dtype).min or values.max() > np.iinfo(dtype).max):
        raise UserError(f"{what}: values {values.min()} to {values.max()} do not fit {narrow.dtype}")
    return narrow
