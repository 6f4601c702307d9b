"""How programs are compiled in tests: each once, and quickly rather than well. Imported before JAX."""

import os
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
# One folder for all workers and all processes that tests start: what one of them compiles, no other does.
QUICKLY = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# XLA's older way to compile loops for a CPU: 40% of the time less for programs as small as those of tests. JAX 0.12 has
# it no more, and ends at a flag that it does not know.
HAS_OLDER_EMITTERS = version("jaxlib").startswith("0.10.")
OLDER_EMITTERS = ["--xla_cpu_use_fusion_emitters=false"] if HAS_OLDER_EMITTERS else []


def xla_flags(*more: str) -> str:
    """$XLA_FLAGS of a process that compiles quickly, with what is there already and `more`."""
    there = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(dict.fromkeys([*there, *OLDER_EMITTERS, *more]))
