"""What records say, and how large their images are, without the images: a file beside each shard, a JSON line a record.

`train-00000-of-00012.array_record` has its lines in `train-00000-of-00012.captions.jsonl`:

    {"category": "animals", "captions": ["a red fox", "a fox, forest"], "size": [640, 480]}

or `null` where the record cannot be read. `size` is the image's width and height as it is shown, `null` where it is no
image; files that an earlier version wrote do not have it. Lines are read from the file whenever they are asked for, so
that no process holds the captions of a whole set.
"""

import atexit
import json
import shutil
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from hart_jax.data.image_files import known_size
from hart_jax.data.staging import Shard
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy


class Captioned(NamedTuple):
    """What a record says of its image."""

    category: str
    captions: list[str]


def caption_line(record: bytes) -> bytes:
    """The line of a packed record."""
    try:
        fields = msgpack.unpackb(record)
        about = {**_captioned(fields)._asdict(), "size": known_size(fields["image"])}
    except (ValueError, TypeError, KeyError, msgpack.UnpackException):
        about = None
    # In ASCII, whatever a caption may hold: a line ends where its record does.
    return json.dumps(about).encode("ascii") + b"\n"


def _captioned(fields: Any) -> Captioned:
    """Of a record's or a line's fields; `TypeError`, `KeyError` or `ValueError` if they are something else."""
    found = Captioned(*(fields[name] for name in Captioned._fields))
    if not isinstance(found.category, str) or not isinstance(found.captions, list):
        raise TypeError("no category, or no list of captions")
    if not all(isinstance(caption, str) for caption in found.captions):
        raise TypeError("a caption is no text")
    return found


class CaptionColumn:
    """Random access to `Captioned` of the records of shards, one after the other; None for one that cannot be read.

    A worker opens the files anew; a file's places are looked up when it is first asked for.

    Args:
      files: as `captions_file` says, of each shard.
      counts: records of each.

    Raises:
      UserError: when asked for what stands in a damaged file.
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int]):
        self._files, self._counts = list(files), list(counts)
        self._starts = [0, *accumulate(counts)]
        self._opened: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Captioned | None:
        number, about = self._line(index)
        try:
            return None if about is None else _captioned(about)
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(number) from error

    def size(self, index: int) -> tuple[int, int] | None:
        """Width and height of a record's image as it is shown; (0, 0) where it cannot be read, None where the file does
        not say."""
        number, about = self._line(index)
        try:
            if about is None or ("size" in about and about["size"] is None):
                return 0, 0
            width, height = about.get("size", (None, None))
            return None if width is None else (int(width), int(height))
        except (ValueError, TypeError, AttributeError) as error:
            raise self._damaged(number) from error

    def _line(self, index: int) -> tuple[int, Any]:
        """In which file the line of a record is, and what it says."""
        number = bisect_right(self._starts, range(len(self))[index]) - 1
        content, ends = self._opened[number] if number in self._opened else self._open(number)
        line = index - self._starts[number]
        start = ends[line - 1] if line else 0
        try:
            return number, json.loads(content[start : ends[line]].tobytes())
        except ValueError as error:
            raise self._damaged(number) from error

    def __reduce__(self) -> tuple:
        return CaptionColumn, (self._files, self._counts)

    def _open(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            content = np.memmap(local_copy(self._files[number]), np.uint8, "r")
        except (OSError, ValueError) as error:
            raise self._damaged(number) from error
        ends = (np.flatnonzero(content == ord("\n")) + 1).astype(np.uint32)
        if len(ends) != self._counts[number]:
            raise self._damaged(number)
        # Set whole: another thread may ask at the same time.
        self._opened[number] = content, ends
        return content, ends

    def _damaged(self, number: int) -> UserError:
        return UserError(f"captions {self._files[number]} are missing or damaged; copy or write the shards again")


def open_column(shards: Sequence[Shard], records: Any) -> CaptionColumn:
    """The column of shards.

    Those that an earlier version wrote have no captions files. Their records, which `records` gives packed by their
    numbers, are read once, and the files made in a folder that this process removes at its end.
    """
    without = sorted({str(shard.path.parent) for shard in shards if shard.captions is None})
    if without:
        print(
            f"{', '.join(without)}: shards without captions files, so that all their records are read", file=sys.stderr
        )
        temporary = Path(tempfile.mkdtemp(prefix="hart_captions_"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    files, start = [], 0
    for number, shard in enumerate(shards):
        file, numbers = shard.captions, range(start, start + shard.count)
        if file is None:
            file = temporary / f"{number}.captions.jsonl"
            with file.open("wb") as lines:
                lines.writelines(_line_of(records, index) for index in numbers)
        files.append(file)
        start = numbers.stop
    return CaptionColumn(files, [shard.count for shard in shards])


def _line_of(records: Any, index: int) -> bytes:
    try:
        return caption_line(records[index])
    except (RuntimeError, ValueError):
        return caption_line(b"")
