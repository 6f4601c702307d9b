"""`python -m hart_jax.checkpoints.convert`: a whole model folder, or one clear error and nothing."""

import importlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from hart_jax.checkpoints.convert.released import read_released
from hart_jax.checkpoints.model_folder import read_model
from hart_jax.errors import UserError
from tests.checkpoints.convert.conftest import edit_tensors


def convert(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    importlib.import_module("hart_jax.checkpoints.convert.__main__").main()


def test_writes_a_model_folder(pristine, tmp_path, monkeypatch, capsys):
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text("{}")
    (tmp_path / "prompt.md").write_text("Say more.\n")
    text = ["--text_encoder", encoder, "--system_prompt", tmp_path / "prompt.md"]
    convert(monkeypatch, "--source", pristine, "--out", tmp_path / "model", *text)
    ours, released = read_model(tmp_path / "model"), read_released(pristine)
    assert (ours.tokenizer_config, ours.transformer_config) == (released.tokenizer_config, released.transformer_config)
    for part in ("tokenizer", "transformer"):
        assert jax.tree.all(jax.tree.map(np.array_equal, getattr(ours, part), getattr(released, part)))
    assert (ours.text_encoder / "system_prompt.txt").read_bytes() == b"Say more.\n"
    assert (ours.text_encoder / "config.json").is_file() and not (encoder / "system_prompt.txt").exists()
    assert "M parameters" in capsys.readouterr().out


def test_bfloat16_is_half_as_large(pristine, tmp_path, monkeypatch):
    convert(monkeypatch, "--source", pristine, "--out", tmp_path / "model", "--dtype", "bfloat16")
    released = pristine / "llm/model.safetensors"
    ours = tmp_path / "model/transformer/model.safetensors"
    assert ours.stat().st_size < 0.6 * released.stat().st_size
    kernel = read_model(tmp_path / "model").transformer["head"]["kernel"]
    np.testing.assert_allclose(kernel, read_released(pristine).transformer["head"]["kernel"], rtol=2**-8)


def test_existing_out_is_left_alone(pristine, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine").write_text("kept")
    with pytest.raises(UserError, match=r"--out=.*model: already exists"):
        convert(monkeypatch, "--source", pristine, "--out", tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine"]


def test_a_fault_leaves_nothing_behind(release, tmp_path, monkeypatch):
    edit_tensors(release / "llm/model.safetensors", lambda tensors: tensors.pop("head.weight"))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"no tensor 'head\.weight'"):
        convert(monkeypatch, "--source", release, "--out", tmp_path / "out/model")
    with pytest.raises(UserError, match="not a text encoder's folder"):
        convert(monkeypatch, "--source", release, "--out", tmp_path / "out/model", "--text_encoder", tmp_path / "none")
    with pytest.raises(UserError, match=r"--system_prompt=prompt\.txt: is stored with a text encoder"):
        convert(monkeypatch, "--source", release, "--out", tmp_path / "out/model", "--system_prompt", "prompt.txt")
    assert not list((tmp_path / "out").iterdir())


def test_exit_code(tmp_path):
    module = "hart_jax.checkpoints.convert"
    command = [sys.executable, "-m", module, "--source", tmp_path / "absent", "--out", tmp_path / "model"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "absent/tokenizer: no such folder" in done.stderr
    assert not list(tmp_path.iterdir())
