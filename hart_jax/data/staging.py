"""Shards of a bucket on this machine's disk: each copied when a record of it is first read, the oldest making room.

They lie in the cache folder's `shards`, named by their SHA-256, so that folders, runs and the processes of a machine
share them. A copy takes its name when its checksum is right; one that was cut is gone on with.
"""

import os
import sys
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import grain
from array_record.python.array_record_module import ArrayRecordReader

from hart_jax.errors import UserError
from hart_jax.io.buckets import copies_in, download, locked
from hart_jax.io.fingerprint import sha256sum
from hart_jax.io.paths import is_remote

GIB = 2**30
_SUFFIX, _PARTIAL = ".array_record", ".partial"
_limit_bytes = 64 * GIB


def stage_at_most(gib: float) -> None:
    """How much of this machine's disk shards of buckets may take from now on: `data.stage_gib`."""
    global _limit_bytes
    _limit_bytes = int(gib * GIB)


def captions_file(shard: Path) -> Path:
    """Where the captions of a shard are: see `hart_jax.data.caption_column`."""
    return shard.with_suffix(".captions.jsonl")


@dataclass(frozen=True)
class Shard:
    """One file of a shard folder: its path, number of records, size in bytes and, in a bucket, SHA-256.

    `captions_bytes` is the size of the file of its captions, None where an earlier version wrote none.
    """

    path: Path
    count: int
    bytes: int
    sha256: str = ""
    captions_bytes: int | None = None

    @property
    def captions(self) -> Path | None:
        return None if self.captions_bytes is None else captions_file(self.path)


def open_records(shards: Sequence[Shard]) -> Any:
    """What gives the bytes of each record of shards, one after the other."""
    if any(is_remote(shard.path) for shard in shards):
        return StagedRecords(shards)
    return grain.sources.ArrayRecordDataSource([str(shard.path) for shard in shards])


class StagedRecords:
    """Random access to the records of shards, one after the other; those in a bucket are read from their copies.

    Picklable, for data workers; threads may share it.

    Raises:
      UserError: on reading, a shard that does not fit, is damaged in the bucket, or cannot be fetched.
    """

    def __init__(self, shards: Sequence[Shard]):
        self._shards, self._limit = list(shards), _limit_bytes
        self._starts = [0, *accumulate(shard.count for shard in self._shards)]
        total = sum({shard.sha256: shard.bytes for shard in self._shards if is_remote(shard.path)}.values())
        if total > self._limit:
            print(
                f"warning: the shards take {total / GIB:.1f} GiB, data.stage_gib is {self._limit / GIB:g}: they are "
                "copied from the bucket again and again",
                file=sys.stderr,
            )
        self._open()

    def __getitem__(self, index: int) -> bytes:
        number = bisect_right(self._starts, index) - 1
        while True:
            path, reader = self._reader(number)
            try:
                return reader.read([index - self._starts[number]])[0]
            except RuntimeError:
                # A reader opens its file on reading; another process may have made room by it before.
                if path.exists() or not is_remote(self._shards[number].path):
                    raise

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_readers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._readers: dict[int, tuple[Path, ArrayRecordReader]] = {}

    def _reader(self, number: int) -> tuple[Path, ArrayRecordReader]:
        path, reader = self._readers.get(number, (None, None))
        # Another process may have made room by it; what is open would still take its room.
        if path is not None and path.exists():
            return path, reader
        with self._lock:
            path, reader = self._readers.pop(number, (None, None))
            if path is None or not path.exists():
                shard = self._shards[number]
                path = staged(shard, self._limit) if is_remote(shard.path) else shard.path
                reader = ArrayRecordReader(str(path), "readahead_buffer_size:0", file_reader_buffer_size=32768)
                self._readers = {key: found for key, found in self._readers.items() if found[0].exists()}
            self._readers[number] = path, reader
            return path, reader


def staged(shard: Shard, limit: int) -> Path:
    """The path of a shard's copy, made where there is none; one process of this machine makes one at a time.

    Raises:
      UserError: it is larger than `limit` bytes, or damaged in the bucket.
    """
    folder = copies_in("shards")
    path = folder / f"{shard.sha256}{_SUFFIX}"
    partial = path.with_suffix(_PARTIAL)
    with locked(folder / ".lock"):
        if path.exists() and path.stat().st_size == shard.bytes:
            os.utime(path)
            return path
        path.unlink(missing_ok=True)
        if shard.bytes > limit:
            raise UserError(
                f"shard {shard.path} has {shard.bytes / GIB:.2f} GiB, more than data.stage_gib={limit / GIB:g}"
            )
        _make_room(folder, limit - shard.bytes, partial)
        # What was left of another try may be damaged; then it is made anew, once.
        for left in (partial.exists(), False):
            download(os.fspath(shard.path), partial, shard.bytes)
            if sha256sum(partial) == shard.sha256:
                with partial.open("rb+") as file:
                    os.fsync(file.fileno())
                os.replace(partial, path)
                return path
            partial.unlink()
            if not left:
                break
    raise UserError(f"shard {shard.path} does not match its checksum; copy or write it again")


def _make_room(folder: Path, most: int, kept: Path) -> None:
    """Removes the copies that were made or asked for longest ago, until no more than `most` bytes are left."""
    files = sorted((file.stat().st_mtime_ns, file) for file in folder.glob("*.*") if file.name != ".lock")
    sizes = {file: file.stat().st_size for _, file in files if file != kept}
    total = sum(sizes.values())
    for file, size in sizes.items():
        if total <= most:
            return
        file.unlink()
        total -= size
