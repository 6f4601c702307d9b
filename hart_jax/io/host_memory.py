"""The memory of this machine, or of the container that this process runs in."""

from pathlib import Path

GIB = 2**30
MEMINFO, CGROUPS, OWN_CGROUP = map(Path, ("/proc/meminfo", "/sys/fs/cgroup", "/proc/self/cgroup"))


def available_bytes() -> int:
    """What the system, or a container around this process, has left."""
    return max(0, min([_system_bytes(), *_container_bytes()]))


def _system_bytes() -> int:
    try:
        lines = MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 8 * GIB


def _container_bytes() -> list[int]:
    """Of version 2 control groups, this process's and those around it, where there is a limit."""
    try:
        own = next(line[3:] for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        own = ""
    group = CGROUPS / own.strip("/")
    groups = [each for each in (group, *group.parents) if each.is_relative_to(CGROUPS)]
    return [left for each in groups if (left := _left_in(each)) is not None]


def _left_in(group: Path) -> int | None:
    """None where there is no limit; copies of files give way."""
    try:
        limit, used, stat = (
            (group / name).read_text().strip() for name in ("memory.max", "memory.current", "memory.stat")
        )
        counts = dict(line.split() for line in stat.splitlines())
        files = int(counts["active_file"]) + int(counts["inactive_file"])
        return None if limit == "max" else int(limit) - int(used) + files
    except (OSError, ValueError, KeyError):
        return None
