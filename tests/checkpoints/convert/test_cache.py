"""Converted weights are kept: a second start finds them, and what is damaged, changed or read-only is no harm."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from hart_jax.checkpoints.convert import cache
from hart_jax.checkpoints.convert.cache import cached_folder, read_released_cached
from hart_jax.checkpoints.convert.released import read_released
from hart_jax.checkpoints.model_folder import Model
from hart_jax.errors import UserError
from tests.checkpoints.convert.conftest import edit_config, edit_tensors


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HART_CACHE_DIR", str(tmp_path / "caches"))
    return tmp_path / "caches"


@pytest.fixture
def converted(monkeypatch) -> list[Path]:
    """Of which releases weights were converted."""
    found = []

    def watched(source, weights):
        found.append(source)
        return read_released(source, weights)

    monkeypatch.setattr(cache, "read_released", watched)
    return found


def same(model: Model, other: Model) -> bool:
    parts = [(one.tokenizer, one.transformer) for one in (model, other)]
    configs = [(one.tokenizer_config, one.transformer_config) for one in (model, other)]
    return configs[0] == configs[1] and jax.tree.all(jax.tree.map(np.array_equal, *parts))


def test_the_second_start_converts_nothing(pristine, converted, caches):
    before = sorted(pristine.rglob("*"))
    first, second = read_released_cached(pristine), read_released_cached(pristine)
    assert converted == [pristine] and same(first, second) and same(second, read_released(pristine))
    assert sorted(pristine.rglob("*")) == before
    assert [path.name for path in (caches / "converted").iterdir()] == [cached_folder(pristine).name]
    # Not read before they are used.
    assert all(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(second.transformer))


def test_another_release_is_converted_anew(release, converted):
    read_released_cached(release)
    edit_tensors(release / "llm/model.safetensors", lambda tensors: tensors["head.weight"].__iadd__(1))
    changed = read_released_cached(release)
    assert len(converted) == 2 and same(changed, read_released(release))
    edit_config(release / "llm/config.json", norm_eps=1e-5)
    assert read_released_cached(release).transformer_config.norm_eps == 1e-5
    copied = shutil.copytree(release, release.with_name("copy"))
    assert cached_folder(Path(copied)) != cached_folder(release)


OFTEN = ("cut short", "one byte")
SELDOM = ("emptied", "without a config", "of another shape", "no checksums")


@pytest.mark.parametrize("damage", [*OFTEN, *(pytest.param(each, marks=pytest.mark.slow) for each in SELDOM)])
def test_a_damaged_cache_is_made_again(pristine, converted, capsys, damage):
    expected = read_released_cached(pristine)
    folder = cached_folder(pristine)
    weights = folder / "transformer/model.safetensors"
    if damage == "cut short":
        os.truncate(weights, weights.stat().st_size - 100)
    elif damage == "emptied":
        os.truncate(weights, 0)
    elif damage == "without a config":
        (folder / "tokenizer/config.json").unlink()
    elif damage == "of another shape":
        edit_config(folder / "transformer/config.json", depth=3)
    elif damage == "one byte":
        with weights.open("r+b") as file:
            file.seek(-101, os.SEEK_END)
            before = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([before ^ 1]))
    else:
        (folder / "checksums.json").unlink()
    capsys.readouterr()
    assert same(read_released_cached(pristine), read_released(pristine))
    assert "are damaged and made again" in capsys.readouterr().err
    read_released_cached(pristine)
    assert capsys.readouterr().err == "" and len(converted) == 2
    del expected


def test_a_cache_that_cannot_be_written_is_left_out(pristine, caches, capsys, monkeypatch):
    caches.write_text("a file is in the way")
    assert same(read_released_cached(pristine), read_released(pristine))
    assert capsys.readouterr().err.count("nothing is kept for the next start") == 1
    assert caches.read_text() == "a file is in the way"


def test_a_full_disk_leaves_nothing(pristine, caches, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_part", full)
    assert same(read_released_cached(pristine), read_released(pristine))
    assert "No space left on device" in capsys.readouterr().err
    assert not list((caches / "converted").iterdir())


def test_what_an_interrupted_conversion_left_is_removed(pristine, caches):
    old, new = caches / "converted/.old.1", caches / "converted/.new.1"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    read_released_cached(pristine)
    assert new.exists() and not old.exists()


def test_a_fault_of_the_release_is_named(release):
    edit_tensors(release / "llm/model.safetensors", lambda tensors: tensors.pop("head.weight"))
    with pytest.raises(UserError, match=r"no tensor 'head\.weight'"):
        read_released_cached(release)
    (release / "llm/model.safetensors").unlink()
    with pytest.raises(UserError, match="no weight file"):
        read_released_cached(release)
