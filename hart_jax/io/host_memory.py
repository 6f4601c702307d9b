"""The memory of this machine, or of the container that this process runs in."""

from pathlib import Path

GIB = 2**30


def available_bytes() -> int:
    """What the system, or its container, has left."""
    return max(0, min([_system_bytes(), *_container_bytes()]))


def _system_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 8 * GIB


def _container_bytes() -> list[int]:
    """Of version 2 control groups, where there is a limit."""
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        return [] if limit == "max" else [int(limit) - int(used)]
    except (OSError, ValueError):
        return []
