"""What a user gives as a path: a local one, one in a bucket, or a mistake that is named."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from hart_jax.checkpoints.export import export
from hart_jax.checkpoints.load import load_model
from hart_jax.checkpoints.model_folder import read_model
from hart_jax.config import DataConfig, HartExperiment, TokenizerExperiment, TokenizerLossConfig
from hart_jax.data.mjhq import read_folder
from hart_jax.data.shards import open_shards, write_shards
from hart_jax.errors import UserError
from hart_jax.evaluation.images import open_images
from hart_jax.evaluation.networks.clip import load_clip
from hart_jax.evaluation.networks.efficientnet import load_efficientnet
from hart_jax.evaluation.networks.inception import load_inception
from hart_jax.io.cache_dir import cache_folder
from hart_jax.io.paths import absolute, as_path, local_only
from hart_jax.text.encoder import load_text_encoder
from hart_jax.text.prompt_filter import load_prompt_filter
from hart_jax.text.prompts import read_prompts_file
from hart_jax.text.system_prompt import read_system_prompt
from hart_jax.tokenizer.perceptual import load_lpips


@pytest.mark.parametrize("text", ["runs/a", "/a:b/c", "C:/x", ".", "a/b://c"])
def test_a_local_path_stays_as_it_is(text):
    assert as_path(text) == Path(text)
    assert absolute(as_path(text)).is_absolute()


@pytest.mark.parametrize(
    "text", ["s3://bucket/run", "file:///run", "gs:/bucket/run", "hf://a/b", Path("gs://bucket/run")]
)
def test_an_unknown_scheme_is_named_with_its_setting(text):
    with pytest.raises(UserError, match=r"--workdir=.*there is no storage .*gs://bucket/folder"):
        as_path(text, "--workdir")


@pytest.mark.parametrize("text", ["gs://", "gs:///run"])
def test_a_bucket_has_a_name(text):
    with pytest.raises(UserError, match="names no bucket"):
        as_path(text)


@pytest.mark.parametrize("name", ["w#1", "w[1]", "w*", "w?x=1"])
def test_what_a_bucket_takes_for_a_pattern_is_refused(name):
    with pytest.raises(UserError, match=r"--out=gs://bucket/.* cannot have . in it; give another name"):
        as_path(f"gs://bucket/{name}/run", "--out")
    assert as_path(f"runs/{name}") == Path(f"runs/{name}")


def test_without_gcsfs_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--workdir=gs://bucket/run: .*hart_jax\[gcs\]"):
        as_path("gs://bucket/run", "--workdir")


def test_what_must_be_local_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="--out=gs://bucket/x: cannot be in a bucket"):
        local_only("gs://bucket/x", "--out")


@pytest.mark.parametrize(
    ("kind", "values", "name"),
    [
        (DataConfig, {"train": "s3://b/x"}, "data.train"),
        (DataConfig, {"sources": ("data", "s3://b/x")}, "data.sources"),
        (DataConfig, {"test": "s3://b/x"}, "data.test"),
        (TokenizerLossConfig, {"perceptual_weights": "s3://b/x"}, "loss.perceptual_weights"),
        (TokenizerExperiment, {"init_from": "s3://b/x"}, "init_from"),
        *[
            (HartExperiment, {name: "s3://b/x"}, name)
            for name in ("tokenizer_from", "init_from", "text_encoder", "system_prompt", "model")
        ],
    ],
)
def test_settings_are_checked_before_anything_starts(kind, values, name):
    with pytest.raises(UserError, match=f"{name}=s3://b/x: there is no storage"):
        kind(**values)


@pytest.mark.parametrize(
    "read",
    [
        load_clip,
        load_efficientnet,
        load_inception,
        load_lpips,
        load_model,
        load_prompt_filter,
        load_text_encoder,
        open_images,
        open_shards,
        read_folder,
        read_model,
        read_prompts_file,
        read_system_prompt,
    ],
)
def test_whatever_reads_or_writes_refuses_it(read):
    with pytest.raises(UserError, match="there is no storage s3:"):
        read("s3://bucket/x")


def test_nothing_is_written_to_a_folder_of_the_schemes_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    with pytest.raises(UserError, match="--out=s3://b/x: there is no storage"):
        write_shards("source", "s3://b/x")
    with pytest.raises(UserError, match="there is no storage"):
        export("runs/x", "s3://b/x")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_cache_folder_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HART_CACHE_DIR", "gs://bucket/cache")
    with pytest.raises(UserError, match="HART_CACHE_DIR=gs://bucket/cache: cannot be in a bucket"):
        cache_folder()
    assert not list(tmp_path.iterdir())


def test_the_space_for_staged_shards_is_the_settings(tmp_path):
    script = """
import runpy, sys
from hart_jax.data import staging
from hart_jax.training import loop
from hart_jax.training import tokenizer_task
tokenizer_task.TokenizerTask = lambda *_: None
loop.run = lambda *_: print(staging._limit_bytes)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    root = Path(__file__).parents[2]
    flags = [f"--config={root / 'configs/emoji_tokenizer.py'}", f"--workdir={tmp_path / 'run'}"]
    flags += ["--config.data.stage_gib=2", "--config.loss.perceptual=0.0"]
    command = [sys.executable, "-c", script, str(root / "train.py"), *flags]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.stdout.split() == [str(2 * 2**30)], run.stderr
