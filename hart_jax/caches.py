"""Where what can be made again is kept, beside no file of the user's: compiled programs and converted weights."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$HART_CACHE_DIR where that is set, else `hart_jax` in $XDG_CACHE_HOME or ~/.cache; it need not exist."""
    own = os.environ.get("HART_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hart_jax"
