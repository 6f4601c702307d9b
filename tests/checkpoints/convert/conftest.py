"""A small released checkpoint, made like a golden case: tokenizer/ and llm/ with formula weights."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.parity.materialize import read_manifest, write_release

CASES = Path(__file__).parents[2] / "parity" / "cases"


@pytest.fixture(scope="session")
def manifest() -> dict[str, Any]:
    """The golden case `flags` without its discriminator, which is most of its bytes; a copy of it may be changed."""
    manifest = read_manifest(CASES / "flags")
    manifest["tensors"] = {key: spec for key, spec in manifest["tensors"].items() if "/disc." not in key}
    return manifest


@pytest.fixture
def changed(manifest: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(manifest)


@pytest.fixture(scope="session")
def pristine(manifest: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("released") / "release"
    write_release(manifest, folder)
    return folder


@pytest.fixture
def release(pristine: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(pristine, tmp_path / "release"))


def edit_tensors(file: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_config(file: Path, **values: Any) -> None:
    """Sets these values; None removes a setting."""
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
