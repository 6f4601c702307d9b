"""Files and folders that are there whole or not at all, and files that hold something other than their content."""

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hart_jax.errors import UserError
from hart_jax.io.buckets import upload, upload_folder
from hart_jax.io.paths import as_path, is_remote, make_folder

# The first bytes of what git leaves in place of a large file that was not fetched.
_POINTER = b"version https://git-lfs.github.com/spec/"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives the name of a file to write, which takes the place of `path` if nothing is raised and is removed if so.

    It is on the disk before it has its name, so that a power cut leaves no empty file under it. In a bucket, where an
    object is there whole or not at all, it is a local file that is uploaded in the end.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            upload(Path(folder) / path.name, path)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        # A full disk is reported without a name.
        if error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path, last: str = "") -> Iterator[Path]:
    """Gives a folder to fill, which becomes `folder` if nothing is raised and is removed if so.

    There must be no such folder by then. All files are on the disk before it has its name. To a bucket they are
    uploaded in the end, those of the name `last` after the others.
    """
    if is_remote(folder):
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
            upload_folder(Path(scratch), folder, last=lambda file: file.name == last)
        return
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(folder: Path, names: Collection[str]) -> None:
    """Removes what killed processes were writing by `atomic_file` as files of these names; no other may write them."""
    for left in folder.glob(".*.[0-9]*"):
        if left.name[1:].rpartition(".")[0] in names:
            left.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole; its folder is made."""
    make_folder(path.parent)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Writes a value as JSON, whole; its folder is made. `options` are those of `json.dumps`."""
    write_text(path, json.dumps(value, **options) + "\n")


def check_readable(path: str | os.PathLike, what: str = "file") -> None:
    """Raises `UserError` where there is no such file, it may not be read, or it is a git-LFS pointer to its content."""
    try:
        with as_path(path).open("rb") as file:
            start = file.read(len(_POINTER))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such {what}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if start == _POINTER:
        raise UserError(f"{path}: a git-LFS pointer instead of the {what}; fetch it with `git lfs pull`")


def check_can_write(folder: Path) -> None:
    """Raises `OSError` where a folder cannot be made or written to, as far as can be told without writing.

    So that this is said before the work, not after it. Nothing is asked of a bucket.
    """
    if is_remote(folder):
        return
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `UserError` if it is missing or is not one, or holds NaN, an infinity, or a
    whole number of more than 64 bits."""
    check_readable(path)
    try:
        values = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_not_finite, parse_float=_finite, parse_int=_whole
        )
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _not_finite(text)


def _whole(text: str) -> int:
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{text[:20]}... is too large a number")
    return number


def _not_finite(text: str) -> float:
    raise ValueError(f"{text} is no finite number")
