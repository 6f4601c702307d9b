"""`sample.py` as people run it: what it writes, and one clear error for each wrong input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hart_jax.config import read_json
from hart_jax.images import read_png_metadata
from hart_jax.model_folder import write_model
from hart_jax.text.minilm import import_minilm
from tests.tiny import TOKENIZER, tiny_model
from tests.tiny_bert import write_published
from tests.train_runs import QUICKLY

ROOT = Path(__file__).parent.parent
CONFIG = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({values!r})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny complete model, its config, and a compilation cache."""
    folder = tmp_path_factory.mktemp("sample")
    import_minilm(write_published(folder / "published"), folder / "text_encoder")
    model = tiny_model(folder / "text_encoder", context_tokens=6, context_dim=24)
    write_model(folder / "model", model)
    values = {
        "tokenizer": TOKENIZER.to_dict(),
        "transformer": model.transformer_config.to_dict(),
        "loss": {"condition_top_k": 8},
        "sample": {"top_k": 8, "top_k_late": 8},
        "model": str(folder / "model"),
    }
    (folder / "tiny.py").write_text(CONFIG.format(values=values))
    return folder


def sample(folder: Path, *flags: str, config: str | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, **QUICKLY, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, str(ROOT / "sample.py"), f"--config={config or folder / 'tiny.py'}", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_pictures_a_grid_and_what_they_are(folder, tmp_path):
    out = tmp_path / "out"
    run = sample(folder, "--prompt=a red apple", "--prompt=a blue dog", "--num_images=2", "--seed=3", f"--out={out}")
    assert run.returncode == 0, run.stderr
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "00000-a-red-apple.png",
        "00000-grid.png",
        "00001-a-red-apple.png",
        "00002-a-blue-dog.png",
        "00003-a-blue-dog.png",
    ]
    about = read_png_metadata(out / "00003-a-blue-dog.png")
    assert (about["prompt"], about["seed"], about["index"]) == ("a blue dog", "3", "1")
    assert json.loads(about["settings"])["top_k"] == 8 and about["model"] == str(folder / "model")
    again = sample(folder, "--prompt=a blue dog", "--num_images=2", "--seed=3", f"--out={out}")
    assert again.returncode == 0, again.stderr
    first, second = (np.asarray(Image.open(out / f"0000{n}-a-blue-dog.png")) for n in (3, 5))
    assert first.shape == (8, 8, 3)
    assert np.abs(first.astype(int) - second).max() <= 1


def test_a_prompt_that_is_too_long_is_cut_and_reported(folder, tmp_path):
    run = sample(folder, "--prompt=a red apple of a blue dog of a red dog", f"--out={tmp_path / 'one.png'}")
    assert run.returncode == 0 and (tmp_path / "one.png").exists()
    assert "warning" in run.stderr and "6" in run.stderr


def broken_model(folder: Path, target: Path, part: str, **changes) -> Path:
    shutil.copytree(folder / "model", target)
    path = target / part / "config.json"
    path.write_text(json.dumps({**read_json(path), **changes}))
    return target


def wrong_inputs(folder: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """Case -> flags (config included), and what the message must name."""
    config, prompt = f"--config={folder / 'tiny.py'}", "--prompt=a red apple"
    other = broken_model(folder, tmp_path / "other", "transformer", norm_eps=1e-5)
    misfit = broken_model(folder, tmp_path / "misfit", "transformer", heads=4)
    truncated = tmp_path / "truncated"
    shutil.copytree(folder / "model", truncated)
    weights = truncated / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "taken.png").write_text("mine")
    return {
        "empty prompt": ([config, "--prompt= "], "prompt"),
        "no prompt": ([config], "--prompt"),
        "empty prompts file": ([config, f"--prompts_file={tmp_path / 'empty.txt'}"], "empty.txt"),
        "missing prompts file": ([config, f"--prompts_file={tmp_path / 'none.txt'}"], "none.txt"),
        "missing config": (["--config=nowhere.py", prompt], "nowhere.py"),
        "no config": ([prompt], "--config"),
        "unknown config key": ([config, "--config.colour=1", prompt], "colour"),
        "unknown nested key": ([config, "--config.sample.colour=1", prompt], "colour"),
        "unknown flag": ([config, prompt, "--colour=1"], "colour"),
        "top_k over V": ([config, prompt, "--top_k=17"], "16 codes"),
        "top_p": ([config, prompt, "--top_p=0"], "top_p"),
        "temperature": ([config, prompt, "--temperature=0"], "temperature"),
        "number of images": ([config, prompt, "--num_images=0"], "num_images"),
        "patch_nums": ([config, prompt, "--config.tokenizer.patch_nums=(1, 2, 5)"], "patch_nums"),
        "missing checkpoint": ([config, prompt, "--checkpoint=nowhere"], "nowhere"),
        "checkpoint of another config": ([config, prompt, f"--checkpoint={other}"], "norm_eps"),
        "checkpoint that does not fit its config": ([config, prompt, f"--checkpoint={misfit}"], "q_bias"),
        "truncated checkpoint": ([config, prompt, f"--checkpoint={truncated}"], "model.safetensors"),
        "file in the way": ([config, prompt, f"--out={tmp_path / 'taken.png'}"], "taken.png"),
    }


def test_wrong_inputs_end_with_one_clear_error_and_nothing_written(folder, tmp_path):
    cases = wrong_inputs(folder, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for case, (flags, named) in cases.items():
        out = [] if any(flag.startswith("--out") for flag in flags) else [f"--out={tmp_path / 'out'}"]
        command = [sys.executable, str(ROOT / "sample.py"), *flags, *out]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        assert run.returncode == 2, f"{case}: {run.returncode} {run.stderr}"
        assert len(lines) == 1 and lines[0].startswith("error: "), f"{case}: {run.stderr}"
        assert named in lines[0], f"{case}: {lines[0]}"
        assert sorted(tmp_path.rglob("*")) == before, f"{case}: wrote something"
    assert (tmp_path / "taken.png").read_text() == "mine"
