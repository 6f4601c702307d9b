"""Files of a workdir that are written bit by bit, which a bucket cannot take: logs, TensorBoard's, profiles.

Those of a workdir in a bucket lie in a folder of this machine, and are uploaded whole, where they have changed,
whenever a checkpoint is due. A start that resumes fetches the logs first.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import jax

from hart_jax.io.buckets import copies_in, retried, upload
from hart_jax.io.fingerprint import sha256
from hart_jax.io.paths import as_path, is_remote


def scratch_folder(workdir: Path) -> Path:
    """Where a run keeps what can be made again: the workdir, or a local folder for one in a bucket.

    Processes of a job may share a machine, so each has its own.
    """
    if not is_remote(workdir):
        return workdir
    name = sha256(os.fspath(workdir).rstrip("/"))[:16]
    return copies_in("workdirs") / name / f"process_{jax.process_index()}"


class LocalSide:
    """The local files of a workdir: its own, or copies that `push` brings to the bucket.

    Args:
      part: of whom they are, so that what one of a run's parts writes is pushed by that one.
    """

    def __init__(self, workdir: str | os.PathLike, part: str):
        self.workdir = as_path(workdir)
        self._remote = is_remote(self.workdir)
        self._pushed: dict[Path, tuple[int, int]] = {}
        self.folder = scratch_folder(self.workdir) / part if self._remote else self.workdir
        if self._remote:
            # Of an earlier start, which another machine may have gone on from.
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, names: Iterable[str]) -> None:
        """Brings the bucket's files of these names, those that there are."""
        for name in names if self._remote else ():
            path = self.workdir / name
            try:
                (self.folder / name).write_bytes(retried(path, path.read_bytes))
            except FileNotFoundError:
                continue

    def push(self) -> None:
        """Uploads every file that has changed since."""
        if not self._remote:
            return
        for file in sorted(self.folder.rglob("*")):
            about = file.stat()
            state = about.st_size, about.st_mtime_ns
            if file.is_file() and self._pushed.get(file) != state:
                upload(file, self.workdir / file.relative_to(self.folder).as_posix())
                self._pushed[file] = state
