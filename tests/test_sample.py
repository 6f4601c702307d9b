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

from hart_jax.io.files import read_json
from hart_jax.io.images import read_png_metadata
from tests.in_process import run_here
from tests.sample_runs import sample, write_tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("sample"))


def run_sample(folder: Path, *flags: str) -> tuple[int, str, str]:
    return sample(folder, f"--config={folder / 'tiny.py'}", *flags)


def test_images_a_grid_and_what_they_are(folder, tmp_path):
    out = tmp_path / "out"
    asked = ["--prompt=a red apple", "--prompt=a blue dog", "--num_images=2", "--seed=3"]
    code, _, err = run_sample(folder, *asked, f"--out={out}")
    assert code == 0, err
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "00000-a-red-apple.png",
        "00000-grid.png",
        "00000-pictures.jsonl",
        "00001-a-red-apple.png",
        "00002-a-blue-dog.png",
        "00003-a-blue-dog.png",
    ]
    about = read_png_metadata(out / "00003-a-blue-dog.png")
    assert (about["prompt"], about["seed"], about["index"]) == ("a blue dog", "3", "1")
    assert json.loads(about["settings"])["top_k"] == 8 and about["model"] == str(folder / "model")
    code, _, err = run_sample(folder, "--prompt=a blue dog", "--num_images=2", "--seed=3", f"--out={out}")
    assert code == 0, err
    first, second = (np.asarray(Image.open(out / f"0000{n}-a-blue-dog.png")) for n in (3, 5))
    assert first.shape == (8, 8, 3)
    assert np.abs(first.astype(int) - second).max() <= 1


def test_a_model_folder_says_by_itself_how_it_is_sampled_from(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    settings = {"cfg": 2.5, "top_k": 5, "top_k_late": 3, "temperature": 0.5}
    (tmp_path / "model" / "sampling.json").write_text(json.dumps(settings))
    asked = ["--prompt=a red apple", "--seed=3", f"--out={tmp_path / 'own.png'}"]
    code, _, err = sample(folder, f"--checkpoint={tmp_path / 'model'}", *asked)
    assert code == 0, err
    given = [f"--config.sample.{name}={value}" for name, value in settings.items()]
    code, _, err = run_sample(folder, *given, *asked[:2], f"--out={tmp_path / 'given.png'}")
    assert code == 0, err
    own, given = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("own", "given"))
    np.testing.assert_array_equal(own, given)
    assert json.loads(read_png_metadata(tmp_path / "own.png")["settings"])["top_k_late"] == 3
    (tmp_path / "model" / "sampling.json").write_text('{"top_k": 500}')
    code, _, err = sample(folder, f"--checkpoint={tmp_path / 'model'}", *asked)
    assert code == 2 and "sampling.json: top_k=500: the codebook has" in err


def test_without_a_model_or_a_config(folder):
    for nothing in ([], ["--checkpoint="]):
        code, _, err = sample(folder, "--prompt=a red apple", *nothing)
        assert code == 2 and err.startswith("error: no model: give --checkpoint=FOLDER")
    code, _, err = sample(folder, "--prompt=a red apple", "--checkpoint=x", "--config.sample.cfg=2")
    assert code == 2 and err == "error: --config.sample.cfg: changes a setting of --config=FILE; give --config, too\n"


def test_a_prompt_that_is_too_long_is_cut_and_reported(folder, tmp_path):
    out = tmp_path / "one.png"
    code, _, err = run_sample(folder, "--prompt=a red apple of a blue dog of a red dog", f"--out={out}")
    assert code == 0 and out.exists()
    assert "warning" in err and "6" in err


def broken_model(folder: Path, target: Path, part: str, **changes) -> Path:
    shutil.copytree(folder / "model", target)
    path = target / part / "config.json"
    path.write_text(json.dumps({**read_json(path), **changes}))
    return target


def wrong_inputs(folder: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """Case -> flags (config included), and what the message must name."""
    config, prompt = f"--config={folder / 'tiny.py'}", "--prompt=a red apple"
    classes = [f"--config.transformer.{name}" for name in ("num_classes=3", "context_tokens=1", "disable_aln=False")]
    other = broken_model(folder, tmp_path / "other", "transformer", norm_eps=1e-5)
    misfit = broken_model(folder, tmp_path / "misfit", "transformer", heads=4)
    truncated = tmp_path / "truncated"
    shutil.copytree(folder / "model", truncated)
    weights = truncated / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "taken.png").write_text("mine")
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}')
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
        "a flag of other programs": ([config, prompt, "--guidance=3"], "--cfg"),
        "negative prompt": ([config, prompt, "--negative_prompt=x"], "docs/api.md"),
        "part of a model": ([prompt, f"--checkpoint={folder / 'model' / 'transformer'}"], f"whole, {folder / 'model'}"),
        "top_k over V": ([config, prompt, "--top_k=17"], "16 codes"),
        "top_p": ([config, prompt, "--top_p=0"], "top_p"),
        "temperature": ([config, prompt, "--temperature=0"], "temperature"),
        "iterations": ([config, prompt, "--masked_iterations=65"], "masked_iterations=65"),
        "a label that is a digit of no number": ([config, *classes, "--labels=\u00b2"], "--labels=\u00b2"),
        "a label in other digits": ([config, *classes, "--labels=\u0661"], "--labels=\u0661"),
        "a label beyond the classes": ([config, *classes, "--labels=3"], "--labels=3"),
        "number of images": ([config, prompt, "--num_images=0"], "num_images"),
        "patch_nums": ([config, prompt, "--config.tokenizer.patch_nums=(1, 2, 5)"], "patch_nums"),
        "missing checkpoint": ([config, prompt, "--checkpoint=nowhere"], "nowhere: no such folder in /"),
        "checkpoint of another config": ([config, prompt, f"--checkpoint={other}"], "norm_eps"),
        "checkpoint that does not fit its config": ([config, prompt, f"--checkpoint={misfit}"], "q_bias"),
        "truncated checkpoint": ([config, prompt, f"--checkpoint={truncated}"], "model.safetensors"),
        "negative batch size": ([config, prompt, "--batch_size=-1"], "batch_size"),
        "seed": ([config, prompt, "--seed=-1"], "seed -1"),
        "prompts that are not JSON": ([config, f"--prompts_file={tmp_path / 'bad.jsonl'}"], "bad.jsonl"),
        "an image to resume": ([config, prompt, "--resume", f"--out={tmp_path / 'new.png'}"], "--resume"),
        "missing text encoder": ([config, prompt, f"--text_encoder={tmp_path / 'none'}"], "none/config.json"),
        "missing system prompt": ([config, prompt, f"--system_prompt={tmp_path / 'none.md'}"], "none.md"),
        "system prompt for a BERT": ([config, prompt, f"--system_prompt={tmp_path / 'bad.jsonl'}"], "system_prompt"),
        "unknown weights": ([config, prompt, "--weights=int4"], "int4"),
        "tensor over devices": ([config, prompt, "--config.mesh.tensor=2"], "mesh.tensor=2"),
        "missing prompt filter": ([config, prompt, f"--prompt_filter={tmp_path / 'none'}"], "none/config.json"),
        "file in the way": ([config, prompt, f"--out={tmp_path / 'taken.png'}"], "taken.png"),
    }


COUNTED = """
from absl import flags
import hart_jax.text.prompt_filter
import sample

class Counted(str):
    looked_up = 0

    def __hash__(self):
        Counted.looked_up += 1
        return super().__hash__()

hart_jax.text.prompt_filter.load_prompt_filter = lambda *_: lambda prompt: prompt != "7"
flags.FLAGS(["sample.py", "--prompt_filter=x"])
kept = sample.allowed([sample.Wanted(Counted(number), 0, None) for number in range(200)])
print(len(kept), Counted.looked_up)
"""


def test_filtering_many_prompts_looks_each_up_a_few_times():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", COUNTED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kept, looked_up = map(int, run.stdout.split())
    assert kept == 199 and looked_up <= 4 * 200


def test_wrong_inputs_end_with_one_clear_error_and_nothing_written(folder, tmp_path):
    cases = wrong_inputs(folder, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for case, (flags, named) in cases.items():
        out = [] if any(flag.startswith("--out") for flag in flags) else [f"--out={tmp_path / 'out'}"]
        code, _, err = run_here("sample.py", *flags, *out, folder=tmp_path)
        lines = [line for line in err.splitlines() if line.strip()]
        assert code == 2, f"{case}: {code} {err}"
        assert len(lines) == 1 and lines[0].startswith("error: "), f"{case}: {err}"
        assert named in lines[0], f"{case}: {lines[0]}"
        assert sorted(tmp_path.rglob("*")) == before, f"{case}: wrote something"
    assert (tmp_path / "taken.png").read_text() == "mine"
