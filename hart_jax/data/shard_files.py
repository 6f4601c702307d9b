"""What dataset.json says of the files of shards, and whether they are whole, as far as their sizes show."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from hart_jax.data.staging import Shard, captions_file
from hart_jax.errors import UserError


def listed(
    folder: Path,
    sums: Mapping[str, str],
    *,
    file: object,
    count: object,
    bytes: object,
    captions_bytes: object = None,
) -> Shard:
    """What dataset.json says of a shard, which must be beside it; `TypeError` if it is something else."""
    if not isinstance(file, str) or Path(file).name != file or file == "..":
        raise TypeError(f"a shard is called {file!r}")
    path, beside = folder / file, None if captions_bytes is None else whole_number(captions_bytes)
    return Shard(path, whole_number(count), whole_number(bytes), sums.get(file, ""), beside)


def whole_number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} should be a number")
    return value


def check_files(shards: Sequence[Shard], sizes: Mapping[str, int] | None) -> None:
    """Raises `UserError` unless shards and their captions are there with their sizes and numbers of records.

    `sizes` are those of the files in their bucket, by name, where records are not counted; None: on this machine.
    """
    for shard in shards:
        _check_size("shard", shard.path, shard.bytes, sizes)
        if shard.captions_bytes is not None:
            _check_size("captions", captions_file(shard.path), shard.captions_bytes, sizes)
        if sizes is not None and not shard.sha256:
            raise UserError(f"{shard.path.parent / 'SHA256SUMS'} has no line for {shard.path.name}; copy it, too")
        count = shard.count if sizes is not None else record_count(shard.path)
        if count != shard.count:
            found = "an unreadable index" if math.isnan(count) else f"{count} records"
            raise UserError(f"shard {shard.path} is damaged: {found} instead of {shard.count}; copy or write it again")


def record_count(path: Path) -> float:
    """NaN where the index cannot be read."""
    reader = ArrayRecordReader(str(path))
    try:
        return reader.num_records() if reader.ok() else math.nan
    finally:
        # Closing a reader of a damaged file raises what its caller reports.
        if reader.ok():
            reader.close()


def _check_size(what: str, path: Path, expected: int, sizes: Mapping[str, int] | None) -> None:
    there = path.is_file() if sizes is None else path.name in sizes
    if not there:
        raise UserError(f"{what} {path} is missing; copy or write it again")
    size = path.stat().st_size if sizes is None else sizes[path.name]
    if size != expected:
        kind = "truncated" if size < expected else "damaged"
        raise UserError(f"{what} {path} is {kind}: {size} bytes instead of {expected}; copy or write it again")
