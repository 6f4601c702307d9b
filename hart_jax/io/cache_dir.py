"""Where what can be made again is kept, beside no file of the user's: compiled programs and converted weights."""

import functools
import os
import sys
from pathlib import Path

from hart_jax.io.paths import local_only


def cache_folder() -> Path | None:
    """$HART_CACHE_DIR where that is set, else `hart_jax` in $XDG_CACHE_HOME or ~/.cache, made where it is missing.

    None where there is no home, or the folder cannot be made: then nothing is kept, and stderr says so once.

    Raises:
      UserError: $HART_CACHE_DIR is in a bucket.
    """
    own, shared = os.environ.get("HART_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        local_only(own, "HART_CACHE_DIR")
    try:
        folder = Path(own) if own else Path(shared or Path.home() / ".cache") / "hart_jax"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        _warn_once(str(error))
        return None
    return folder


@functools.cache
def _warn_once(reason: str) -> None:
    print(f"warning: nothing is kept for the next start ({reason}); set HART_CACHE_DIR to a folder", file=sys.stderr)
