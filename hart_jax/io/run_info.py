"""Which code, libraries and devices a run was started with, one line of runs.jsonl for every start and restart."""

import datetime
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax

from hart_jax.io.local_side import LocalSide

RUNS_FILE = "runs.jsonl"
_PACKAGES = ("hart_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def manifest() -> dict[str, Any]:
    """Start time (UTC), versions, devices and processes; a version that nobody knows is None."""
    device = jax.devices()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {name: package_version(name) for name in _PACKAGES},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def append_manifest(workdir: str | os.PathLike, step: int, steps: int) -> None:
    """Adds a start at `step`, towards `steps`, to the workdir's runs.jsonl; does nothing in all processes but one."""
    if jax.process_index() == 0:
        side = LocalSide(workdir, "manifest")
        side.fetch((RUNS_FILE,))
        with open(side.folder / RUNS_FILE, "a") as file:
            file.write(json.dumps({"step": step, "steps": steps, **manifest()}) + "\n")
        side.push()


def package_version(package: str) -> str | None:
    """Of an installed package; None of one that is not, as hart_jax is where it runs from its checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, with "-dirty" where it was changed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
