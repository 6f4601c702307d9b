"""One test item for every group of arrays of every golden case."""

from pathlib import Path

import numpy as np
import pytest

from tests.parity.golden import find_cases

PUBLISHED = Path(__file__).parent / "cases"


@pytest.fixture(autouse=True)
def as_users_compile(compile_well: None) -> None:
    """In all modules here."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"folder", "group"} <= set(metafunc.fixturenames):
        items = [(folder, group) for folder in _cases(metafunc.config) for group in _groups(folder)]
        metafunc.parametrize("folder, group", items, ids=[f"{folder.name}-{group}" for folder, group in items])


def _cases(config: pytest.Config) -> list[Path]:
    golden = config.getoption("--golden")
    folder = PUBLISHED if golden is None else (config.invocation_params.dir / golden).resolve()
    cases = find_cases(folder)
    if not cases:
        raise pytest.UsageError(
            f"--golden={golden}: no case in it, which is a folder with manifest.json and vectors.npz"
        )
    return cases


def _groups(folder: Path) -> list[str]:
    with np.load(folder / "vectors.npz") as vectors:
        return list(dict.fromkeys(name.partition(".")[0] for name in vectors.files))
