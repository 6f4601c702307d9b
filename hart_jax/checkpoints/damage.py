"""What an error says about the file that was read: that it is damaged, or nothing, because the reading failed.

Orbax wraps what TensorStore, Grain and JSON raise; TensorStore's errors are told apart by the status that their text
begins with (https://abseil.io/docs/cpp/guides/status-codes).
"""

import json
import re
import zlib
from collections.abc import Iterator

from orbax.checkpoint import v1 as ocp

# Where an error has none of them, TensorStore could not make sense of what it read.
_DAMAGED = ("NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE")
_TENSORSTORE = re.compile(r"Error (opening|reading|decoding) ")
_OTHER_ARRAYS = re.compile(r"Requested shape: |.*tree structures do not match")
_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|.*[Oo]ut of memory")


class Damaged(ValueError):
    """A file is not what was once written."""


def is_damage(error: BaseException) -> bool:
    """Whether a file is damaged or missing, so that reading it again is of no use."""
    return not _is_out_of_memory(error) and _kind(root_of(error)) == "damaged"


def is_passing(error: BaseException) -> bool:
    """Whether the reading failed, not the file: the network, a mount, a lack of permission."""
    return not _is_out_of_memory(error) and _kind(root_of(error)) == "passing"


def is_of_other_arrays(error: BaseException) -> bool:
    """Whether the file is whole, but its arrays are not those that were asked for."""
    return any(_OTHER_ARRAYS.match(str(one)) for one in _chain(error))


def root_of(error: BaseException) -> BaseException:
    """The error that the others only wrap."""
    return list(_chain(error))[-1]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from, as far as that is said on purpose."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_out_of_memory(error: BaseException) -> bool:
    return any(isinstance(one, MemoryError) or _OUT_OF_MEMORY.match(str(one)) for one in _chain(error))


def _kind(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return "damaged"
    if isinstance(error, OSError):
        return "passing"
    # The second is Orbax's, of a folder without what makes it a checkpoint.
    if isinstance(
        error,
        Damaged
        | ocp.errors.InvalidLayoutError
        | json.JSONDecodeError
        | UnicodeDecodeError
        | EOFError
        | KeyError
        | zlib.error,
    ):
        return "damaged"
    status, colon, _ = str(error).partition(": ")
    if colon and re.fullmatch(r"[A-Z_]{4,}", status):
        return "damaged" if status in _DAMAGED else "passing"
    return "damaged" if _TENSORSTORE.match(str(error)) else "other"
