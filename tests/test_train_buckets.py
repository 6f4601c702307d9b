"""Training in aspect buckets: each image once an epoch of its bucket, and the same to the last bit when resumed."""

import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from hart_jax.checkpoints.orbax import CHECKPOINT_DIR
from hart_jax.checkpoints.workdir import read_hart_experiment, read_workdir
from hart_jax.training.inputs import INPUTS_FILE
from hart_jax.training.metrics import RECORDS_FILE, SAMPLES_DIR, read_metrics
from tests.in_process import run_here
from tests.kill_and_resume import assert_same_run, kill_and_resume
from tests.train_runs import (
    BUCKETS,
    Run,
    assert_epochs_of_buckets,
    logged_steps,
    outcome,
    run_to_end,
    start_job,
    undisturbed,
    without_sampling,
    write_hart_config,
    write_tokenizer_config,
)

STEPS = 32
# Of each of `BUCKETS`, width x height in pixels.
PIXELS = ("8x8", "6x10", "10x6", "6x12", "12x6")
SETTINGS = (
    "--config.train.log_records=True",
    "--config.train.log_every=1",
    "--config.train.save_every=8",
    f"--config.train.steps={STEPS}",
    f"--config.train.sample_every={STEPS}",
)
TWO = BUCKETS[:2]


def compiled_steps(messages: list[str]) -> int:
    return sum(message.startswith("Finished XLA compilation of jit(step)") for message in messages)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Run, str, int]:
    """A whole run in two buckets, what it said, and how many steps it compiled."""
    folder = tmp_path_factory.mktemp("two")
    settings = (f"--config={write_hart_config(folder / 'inputs', ahead=True, buckets=TWO)}", *SETTINGS)
    messages: list[str] = []
    with pytest.MonkeyPatch.context() as patch, jax.log_compiles(), without_sampling():
        patch.setattr("logging.Logger.callHandlers", lambda logger, record: messages.append(record.getMessage()))
        code, out, err = run_to_end(*settings, f"--workdir={folder / 'whole'}")
    assert code == 0, err
    return Run(folder / "whole", settings), out, compiled_steps(messages)


def test_each_image_comes_once_an_epoch_of_its_bucket(two):
    (run, _), _, _ = two
    assert_epochs_of_buckets(run, TWO)
    assert [line["step"] for line in read_metrics(run)] == list(range(1, STEPS + 1))
    assert set(json.loads((run / INPUTS_FILE).read_text())) == {"data", "data.buckets"}


def test_the_buckets_are_told_before_anything_is_compiled(two):
    (run, _), out, compiled = two
    first, *rest = out.splitlines()
    assert first == "buckets: 1:1 8x8 px, 17 images; 2:3 6x10 px, 14 images; at most 2 training steps are compiled"
    assert f"{run}: starting at step 0 of {STEPS}" in rest
    assert compiled == 2


def test_there_is_a_grid_of_each_bucket(two):
    (run, _), _, _ = two
    names = [f"samples_1x1_{STEPS:08d}.png", f"samples_2x3_{STEPS:08d}.png"]
    assert sorted(path.name for path in (run / SAMPLES_DIR).iterdir()) == names
    square, narrow = (Image.open(run / SAMPLES_DIR / name).width for name in names)
    assert square - narrow == 2 * len(read_hart_experiment(run).sample_prompts)


def resumed(run: Run, folder: Path) -> Path:
    """A copy of the run as it was at step 24."""
    workdir = shutil.copytree(run.workdir, folder / "run")
    shutil.rmtree(workdir / CHECKPOINT_DIR / str(STEPS))
    for grid in (workdir / SAMPLES_DIR).iterdir():
        grid.unlink()
    return workdir


def test_a_resumed_run_goes_on_with_the_same_batches(two, tmp_path):
    run, _, _ = two
    workdir = resumed(run, tmp_path)
    with without_sampling():
        code, out, err = run_to_end(*run.settings, f"--workdir={workdir}")
    assert code == 0, err
    assert f"resuming at step 24 of {STEPS}" in out
    assert_same_run(workdir, run.workdir, ("params", "ema"))


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("five")
    config = write_hart_config(folder / "inputs", ahead=True, buckets=BUCKETS)
    return undisturbed(folder, f"--config={config}", *SETTINGS)


@pytest.mark.slow
def test_a_run_in_five_buckets(five):
    run, _ = five
    assert_epochs_of_buckets(run)
    names = [f"samples_{name.replace(':', 'x')}_{STEPS:08d}.png" for name in BUCKETS]
    assert sorted(names) == sorted(path.name for path in (run / SAMPLES_DIR).iterdir())
    widths = [Image.open(run / SAMPLES_DIR / name).width for name in names]
    assert widths[1] == widths[3] < widths[0] < widths[2] < widths[4]
    assert read_workdir(run).transformer_config.patch_nums == (1, 2, 4)


@pytest.mark.slow
def test_tokens_and_text_states_come_from_the_records(five, tmp_path):
    whole, settings = five
    inputs, stored = whole.parent / "inputs", tmp_path / "stored"
    options = {
        "--shards": inputs / "train" / "shards",
        "--out": stored,
        "--tokenizer": inputs / "tokenizer",
        "--buckets": ",".join(BUCKETS),
        "--text_encoder": inputs / "text_encoder",
        "--context_tokens": 6,
    }
    code, _, err = run_here("hart_jax.data.precompute", *(f"{name}={value}" for name, value in options.items()))
    assert code == 0, err
    given = (f"--config.data.train={stored}", "--config.data.cache=False", "--config.data.workers=1")
    code, _, err = run_to_end(*settings, *given, "--config.train.sample_every=0", f"--workdir={tmp_path / 'run'}")
    assert code == 0, err
    assert not (tmp_path / "run" / "tokens").exists() and not (tmp_path / "run" / "text_states").exists()
    assert (tmp_path / "run" / RECORDS_FILE).read_bytes() == (whole / RECORDS_FILE).read_bytes()
    for ours, theirs in zip(read_metrics(tmp_path / "run"), read_metrics(whole), strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)


@pytest.mark.slow
def test_a_tokenizer_is_trained_in_buckets(tmp_path):
    config = write_tokenizer_config(tmp_path / "inputs", buckets=TWO)
    run = undisturbed(tmp_path, f"--config={config}", *SETTINGS)
    assert_epochs_of_buckets(run.workdir, TWO)
    names = [f"reconstructions_{name.replace(':', 'x')}_{STEPS:08d}.png" for name in TWO]
    assert sorted(path.name for path in (run.workdir / SAMPLES_DIR).iterdir()) == sorted(names)
    workdir = resumed(run, tmp_path)
    code, _, err = run_to_end(*run.settings, f"--workdir={workdir}")
    assert code == 0, err
    assert_same_run(workdir, run.workdir, ("model.params", "model.ema", "code_usage_V"))


@pytest.mark.slow
def test_killed_it_ends_as_if_nobody_had_killed_it(tmp_path):
    assert len(kill_and_resume(tmp_path, "buckets", processes=1, kills=1, seed=1)) == 1
    assert_epochs_of_buckets(tmp_path / "killed")


@pytest.mark.slow
def test_killed_on_two_processes_it_goes_on_with_one_and_back(tmp_path):
    config = write_hart_config(tmp_path / "inputs", ahead=True, buckets=BUCKETS)
    settings = (f"--config={config}", *SETTINGS, "--config.train.sample_every=0")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # The mesh of two devices is the same, whosever they are.
    code, _, err = run_to_end(*settings, f"--workdir={whole}", devices=2)
    assert code == 0, err
    for until, (processes, devices) in ((10, (2, 1)), (20, (1, 2))):
        job = start_job(*settings, f"--workdir={killed}", processes=processes, devices=devices)
        while logged_steps(killed) < until:
            assert all(process.poll() is None for process in job), outcome(job)
            time.sleep(0.001)
        for process in job:
            process.kill()
        outcome(job)
    code, out, err = run_to_end(*settings, f"--workdir={killed}", processes=2)
    assert code == 0, err
    assert "resuming at" in out
    assert_same_run(killed, whole, ("params", "ema"), grids=False)
    assert_epochs_of_buckets(killed)


@pytest.mark.slow
def test_a_mesh_trains_in_buckets_as_one_device_does(tmp_path):
    config = write_hart_config(tmp_path / "inputs", buckets=TWO)
    steps = ("--config.train.steps=12", "--config.train.sample_every=12")
    mesh = (
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        "--config.train.accumulate=2",
        "--config.train.remat=full",
    )
    one, four = tmp_path / "one", tmp_path / "four"
    for workdir, devices, more in ((one, 1, ()), (four, 4, mesh)):
        arguments = (f"--config={config}", *SETTINGS, *steps, *more, f"--workdir={workdir}")
        code, _, err = run_to_end(*arguments, devices=devices)
        assert code == 0, err
    assert (one / RECORDS_FILE).read_bytes() == (four / RECORDS_FILE).read_bytes()
    for ours, theirs in zip(read_metrics(four), read_metrics(one), strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5, err_msg=str(theirs["step"]))
    images = sorted(path.name for path in (one / SAMPLES_DIR).iterdir())
    assert len(images) == len(TWO)
    for name in images:
        ours, theirs = (np.asarray(Image.open(run / SAMPLES_DIR / name)).astype(int) for run in (four, one))
        np.testing.assert_allclose(ours, theirs, atol=1, err_msg=name)
