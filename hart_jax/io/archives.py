"""What is unpacked from archives that come from elsewhere has a limit: a small file can say that it holds petabytes."""

from collections.abc import Iterable
from pathlib import Path

from hart_jax.errors import UserError

# Of one archive: far above every package and weight file that is read from one.
MAX_UNPACKED_BYTES = 4 << 30


def check_unpacked(path: str | Path, sizes: Iterable[int]) -> None:
    """Raises `UserError` if members of these sizes, in bytes, are more than `MAX_UNPACKED_BYTES` together."""
    total = sum(sizes)
    if total > MAX_UNPACKED_BYTES:
        raise UserError(f"{path}: unpacked it has {total} bytes, more than {MAX_UNPACKED_BYTES}; fetch it again")
