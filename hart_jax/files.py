"""Files that are there whole or not at all, and files that hold something other than their content."""

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hart_jax.buckets import upload
from hart_jax.errors import UserError
from hart_jax.paths import is_remote, make_folder

# The first bytes of what git leaves in place of a large file that was not fetched.
_POINTER = b"version https://git-lfs.github.com/spec/"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
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
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        # A full disk is reported without a name.
        if error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Checksum of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, whole; its folder is made."""
    make_folder(path.parent)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_readable(path: str | os.PathLike, what: str = "file") -> None:
    """Raises `UserError` where there is no such file, it may not be read, or it is a git-LFS pointer to its content."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_POINTER))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such {what}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if start == _POINTER:
        raise UserError(f"{path}: a git-LFS pointer instead of the {what}; fetch it with `git lfs pull`")


def check_can_write(folder: Path) -> None:
    """Raises `OSError` where a folder cannot be made or written to, as far as can be told without writing.

    So that this is said before the work, not after it.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))
