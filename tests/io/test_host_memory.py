"""How much memory is left: what the system says, or less where a container's limit says so."""

from pathlib import Path

import pytest

from hart_jax.io import host_memory
from hart_jax.io.host_memory import GIB, available_bytes


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A folder with the files of a machine that has 6 of 16 GiB left, and no containers."""
    for name, file in (("MEMINFO", "meminfo"), ("CGROUPS", "cgroups"), ("OWN_CGROUP", "own")):
        monkeypatch.setattr(host_memory, name, tmp_path / file)
    (tmp_path / "meminfo").write_text(
        f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1024 kB\nMemAvailable: {6 * GIB // 1024} kB\n"
    )
    return tmp_path


def limit(group: Path, most: int | str, used: int, files: int = 0) -> None:
    """Writes a control group, of whose use a part is copies of files."""
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    inactive = files // 3
    (group / "memory.stat").write_text(f"anon 5\nactive_file {files - inactive}\ninactive_file {inactive}\n")


def test_without_a_container_it_is_the_systems(machine):
    assert available_bytes() == 6 * GIB
    (machine / "own").write_text("12:cpu:/user\n0::/user.slice\n")
    assert available_bytes() == 6 * GIB
    limit(machine / "cgroups" / "user.slice", "max", 9 * GIB)
    assert available_bytes() == 6 * GIB


@pytest.mark.parametrize("own", ["0::/\n", None])
def test_a_containers_limit_counts_less_what_is_used_but_for_files(machine, own):
    """Within a container its group is the root."""
    if own:
        (machine / "own").write_text(own)
    limit(machine / "cgroups", 4 * GIB, 3 * GIB)
    assert available_bytes() == GIB
    limit(machine / "cgroups", 4 * GIB, 3 * GIB, files=2 * GIB)
    assert available_bytes() == 3 * GIB
    limit(machine / "cgroups", 12 * GIB, 3 * GIB)
    assert available_bytes() == 6 * GIB
    # What is over its limit has nothing left.
    limit(machine / "cgroups", 4 * GIB, 5 * GIB)
    assert available_bytes() == 0


def test_the_narrowest_of_all_groups_around_counts(machine):
    """As a job of a scheduler has them, which sees the whole tree."""
    (machine / "own").write_text("0::/system.slice/job_7/step_0\n")
    job = machine / "cgroups" / "system.slice" / "job_7"
    limit(job / "step_0", "max", GIB)
    limit(job, 3 * GIB, GIB)
    assert available_bytes() == 2 * GIB
    limit(job / "step_0", 2 * GIB, GIB)
    assert available_bytes() == GIB
    # Of another job, which does not count.
    limit(machine / "cgroups" / "system.slice" / "job_8", GIB, GIB)
    assert available_bytes() == GIB


@pytest.mark.parametrize("broken", ["memory.max", "memory.current", "memory.stat"])
def test_what_cannot_be_read_says_nothing(machine, broken):
    limit(machine / "cgroups", GIB, 0)
    assert available_bytes() == GIB
    (machine / "cgroups" / broken).write_text("?")
    assert available_bytes() == 6 * GIB
    (machine / "cgroups" / broken).unlink()
    assert available_bytes() == 6 * GIB
    (machine / "meminfo").write_text("MemTotal: 16 kB\n")
    assert available_bytes() == 8 * GIB
