"""Who writes into a folder: one run at a time.

The owner holds an operating system's lock on a small file in the folder, which says who it is. The system takes the
lock back when the process ends, however it ends, so that a file which is left behind stops nobody.
"""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from hart_jax.errors import TryLater, UserError
from hart_jax.io.bucket_lock import OWNER_FILE, BucketLock, owner, shown, taken
from hart_jax.io.buckets import NO_LOCKS
from hart_jax.io.paths import as_path, is_remote

# Of a refusal, as one process tells it to the others.
_MESSAGE_BYTES = 2048


@contextlib.contextmanager
def owned(folder: str | os.PathLike, what: str) -> Iterator[None]:
    """Within it, `folder` belongs to this run alone; it is made where it does not exist.

    Of a job of several processes the first one holds the lock, and all of them end if it is refused: every process must
    call this. A folder that was made here and is still empty at the end is removed.

    Args:
      what: of the owner, for the message that others get: "a training run".

    Raises:
      TryLater: another run owns the folder.
      UserError: the folder cannot be written to. A file system without locks is a warning.
    """
    held: _Lock | BucketLock | None = None
    refusal = ""
    if _process_index() == 0:
        try:
            held = BucketLock(as_path(folder), what) if is_remote(folder) else _Lock(as_path(folder), what)
        except UserError as error:
            refusal = f"{error.exit_code} {error}"
    try:
        refusal = _from_first_process(refusal)
        if refusal:
            code, _, sentence = refusal.partition(" ")
            raise TryLater(sentence) if int(code) == TryLater.exit_code else UserError(sentence)
        yield
    finally:
        if held is not None:
            held.release()


class _Lock:
    """The lock of one folder, taken; raises `UserError` if it cannot be."""

    def __init__(self, folder: Path, what: str):
        self._path = folder / OWNER_FILE
        try:
            self._made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._take()
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(owner(what)).encode() + b"\n", 0)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written to ({error.strerror}); give another folder") from None

    def _take(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                by = _read_owner(descriptor)
                os.close(descriptor)
                raise taken(self._path.parent, by) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(descriptor)
                    raise
                print(
                    f"warning: {self._path.parent}: its file system has no locks ({error.strerror}); "
                    "see to it that no other run writes there",
                    file=sys.stderr,
                )
                return descriptor
            # An owner that ended meanwhile has removed the file that was locked here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                    return descriptor
            os.close(descriptor)

    def release(self) -> None:
        # A folder may have been removed under the run.
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            if self._made:
                self._path.parent.rmdir()
        os.close(self._descriptor)


def _read_owner(descriptor: int) -> str:
    try:
        return shown(json.loads(os.pread(descriptor, 1 << 16, 0)))
    except (ValueError, KeyError, TypeError):
        return "another run, which is just starting"


def _process_index() -> int:
    if not _several_processes():
        return 0
    import jax

    return jax.process_index()


def _from_first_process(message: str) -> str:
    """What the first process gave."""
    if not _several_processes():
        return message
    import numpy as np
    from jax.experimental import multihost_utils

    text = np.frombuffer(message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(text))
    return told.tobytes().rstrip(b"\0").decode(errors="replace")


def _several_processes() -> bool:
    # Programs that never need JAX own folders too.
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1
