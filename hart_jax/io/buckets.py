"""What is kept in Google Cloud Storage: local copies of what is read, uploads of what is written, plain errors.

A bucket that does not answer is asked again for `RETRY_SECONDS`. An object is there whole or not at all; a folder is
not, so what marks one as complete is uploaded last.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from hart_jax.errors import UserError
from hart_jax.io.cache_dir import cache_folder
from hart_jax.io.fingerprint import json_digest
from hart_jax.io.paths import GS, as_path, is_remote

RETRY_SECONDS = 300.0
LONGEST_WAIT = 20.0
_FIRST_WAIT = 1.0
# Read at a time; what is lost at most where a download is cut.
PIECE = 64 << 20
# What `flock` says where a file system has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_T = TypeVar("_T")


@functools.cache
def file_system() -> Any:
    """gcsfs's, with the account and the address that the environment names."""
    # It writes a traceback for what is retried or reported here.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    import gcsfs

    return gcsfs.GCSFileSystem(use_listings_cache=False)


def retried(path: str | os.PathLike[str], work: Callable[[], _T]) -> _T:
    """What `work` gives, asked again while the bucket of `path` does not answer.

    Raises:
      UserError: no permission, or no answer in `RETRY_SECONDS`. Other errors of `work`, as FileNotFoundError, pass.
    """
    start, wait = time.monotonic(), _FIRST_WAIT
    while True:
        try:
            return work()
        except Exception as error:  # gcsfs, aiohttp and google.auth each raise their own kinds
            refusal = _refusal(error)
            if refusal:
                raise UserError(f"{path}: {refusal}") from error
            if not _passing(error):
                raise
            if time.monotonic() - start > RETRY_SECONDS:
                raise UserError(f"{path}: the bucket does not answer ({_line(error)}); try again later") from error
            if wait == _FIRST_WAIT:
                answer = f"the bucket does not answer ({_line(error)}); asked again for {RETRY_SECONDS:.0f} s"
                print(f"warning: {path}: {answer}", file=sys.stderr, flush=True)
        time.sleep(wait * random.uniform(0.5, 1))
        wait = min(2 * wait, LONGEST_WAIT)


def check_bucket(path: Path, setting: str, write: bool = False) -> None:
    """Asks a bucket for something below `path` and, to `write`, puts a small object there and removes it.

    Raises:
      UserError: there is no such bucket, or this account may not; it names `setting`. Nothing for a local path.
    """
    if not is_remote(path):
        return
    files, name = file_system(), f"{setting}={path}"
    bucket, _, key = os.fspath(path).removeprefix(GS).partition("/")
    listed = functools.partial(files.call, "GET", "b/{}/o", bucket, prefix=key, maxResults=1, json_out=True)
    probe = f"{os.fspath(path).rstrip('/')}/.check-{uuid.uuid4().hex}"
    try:
        retried(name, listed)
        if write:
            retried(name, functools.partial(files.pipe_file, probe, b"may write"))
            retried(name, functools.partial(_remove, probe))
    except FileNotFoundError:
        raise _no_bucket(path, name) from None


def local_copy(source: str | os.PathLike[str], setting: str = "") -> Path:
    """A local path as it is; of a file or folder in a bucket a copy in the cache folder, which is kept.

    An object is compared with the checksum that the bucket has of it. A download that was cut is gone on with. What
    changes in the bucket is copied anew.

    Raises:
      UserError: as `as_path`, there is nothing of that name, or what `retried` says.
    """
    path = as_path(source, setting)
    if not is_remote(path):
        return path
    name, text = f"{setting}={path}" if setting else str(path), os.fspath(path).rstrip("/")
    root = text.removeprefix(GS)
    try:
        found = retried(name, functools.partial(file_system().find, text, detail=True))
    except FileNotFoundError:
        found = {}
    objects = {key.removeprefix(root).lstrip("/"): about for key, about in found.items() if not key.endswith("/")}
    if not objects:
        raise UserError(f"{name}: there is no such file or folder in the bucket")
    about = [[key, about["size"], _version(about)] for key, about in sorted(objects.items())]
    folder = copies_in("buckets") / json_digest([root, about])[:16]
    copy, complete = folder / path.name, folder / ".complete"
    with locked(folder / ".lock"):
        if not complete.exists():
            for key, about in objects.items():
                _copy_object(f"{text}/{key}" if key else text, copy / key if key else copy, about)
            complete.touch()
    return copy


def copies_in(kind: str) -> Path:
    """Where copies of this kind are kept on this machine; `UserError` where nothing can be."""
    folder = cache_folder()
    if folder is None:
        raise UserError("what is in a bucket is copied to this machine, which has no place for it: set HART_CACHE_DIR")
    return folder / kind


def download(source: str, target: Path, size: int) -> None:
    """Copies an object of `size` bytes to `target`, or what is missing of it there."""
    have = target.stat().st_size if target.exists() else 0
    with target.open("ab" if have <= size else "wb") as file:
        have = file.tell()
        while have < size:
            piece = functools.partial(file_system().cat_file, source, start=have, end=min(have + PIECE, size))
            data = retried(source, piece)
            if not data:
                raise UserError(f"{source}: ends after {have} of {size} bytes; it has changed, start again")
            file.write(data)
            have += len(data)


def object_sizes(folder: Path) -> dict[str, int]:
    """Name and size in bytes of the objects of a folder in a bucket."""
    found = retried(folder, functools.partial(file_system().ls, os.fspath(folder), detail=True))
    return {about["name"].rpartition("/")[2]: about["size"] for about in found if about["type"] == "file"}


def upload(source: Path, target: Path) -> None:
    """Copies a file to an object, whole; `UserError` if there is no such bucket, or as `retried`."""
    try:
        retried(target, functools.partial(file_system().put_file, str(source), os.fspath(target)))
    except FileNotFoundError:
        if not source.exists():
            raise
        raise _no_bucket(target) from None


def upload_folder(source: Path, target: Path, last: Callable[[Path], bool] = lambda _: False) -> None:
    """Copies all files below a folder to objects below another; those for which `last` is true after the others."""
    files = sorted(file for file in source.rglob("*") if file.is_file())
    for file in sorted(files, key=last):
        upload(file, target / file.relative_to(source).as_posix())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process of this machine at a time do what follows; a file system without locks is a warning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            reason = f"the cache folder's file system has no locks ({error.strerror})"
            _warn_without_locks(f"{reason}; set HART_CACHE_DIR to a local disk")
        yield


@functools.cache
def _warn_without_locks(reason: str) -> None:
    print(f"warning: {reason}", file=sys.stderr)


def _copy_object(source: str, target: Path, about: dict[str, Any]) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    for attempt in range(2):
        download(source, partial, about["size"])
        if not _differs(partial, about):
            os.replace(partial, target)
            return
        partial.unlink()
        if attempt:
            raise UserError(f"{source}: what arrives does not match the bucket's checksum; try again")


def _differs(file: Path, about: dict[str, Any]) -> bool:
    """Whether a file's content is not what the bucket's MD5 says; objects put together of several have none."""
    expected = about.get("md5Hash")
    if not expected:
        return file.stat().st_size != about["size"]
    import base64

    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "md5").digest() != base64.b64decode(expected)


def _version(about: dict[str, Any]) -> str:
    return str(next((about[name] for name in ("md5Hash", "generation", "etag", "updated") if about.get(name)), ""))


def _no_bucket(path: Path, name: str = "") -> UserError:
    bucket = os.fspath(path).removeprefix(GS).partition("/")[0]
    return UserError(f"{name or path}: there is no bucket {bucket}; make it, or fix the name")


def _remove(path: str) -> None:
    # A retry may find it gone.
    with contextlib.suppress(FileNotFoundError):
        file_system().rm_file(path)


def _refusal(error: BaseException) -> str:
    """What to do about an error that only the user can fix; empty for others."""
    import google.auth.exceptions

    if isinstance(error, google.auth.exceptions.DefaultCredentialsError):
        return "there is no account to ask the bucket as; run: gcloud auth application-default login"
    if getattr(error, "code", None) in (401, "401", 403, "403") or str(error).startswith("Forbidden"):
        return (
            "this account may not read or write there; give it the role Storage Object User on the bucket "
            f"({' '.join(str(error).split())})"
        )
    return ""


def _passing(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    from gcsfs.retry import is_retriable

    return is_retriable(error) or isinstance(error, TimeoutError | ConnectionError)


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
