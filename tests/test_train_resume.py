"""Training killed with SIGKILL and rerun ends with the bits of an undisturbed run."""

import functools
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from hart_jax.checkpoints.orbax import CHECKPOINT_DIR, load_config, load_params
from hart_jax.io.run_info import RUNS_FILE
from hart_jax.training.metrics import RECORDS_FILE, TIMINGS_FILE, read_metrics
from tests.kill_and_resume import assert_same_run, unfinished_saves
from tests.train_runs import (
    METRICS,
    Run,
    kill_when,
    logged_steps,
    run_to_end,
    signal_when,
    start,
    undisturbed,
    write_hart_config,
    write_tokenizer_config,
)

# What writes a config file of 32 steps and its inputs into a folder, and the fields of the state to compare. Over two
# processes and with other settings, `tests/test_train_killed.py` kills.
EXPERIMENTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "tokenizer": (write_tokenizer_config, ("model.params", "model.ema", "code_usage_V")),
    "hart": (functools.partial(write_hart_config, ahead=True, muon=1e-2, keep_counts=2), ("params", "ema")),
}


def whole_run(folder: Path, experiment: str) -> Run:
    """Some of its checkpoints fall between logged steps."""
    write_config, _ = EXPERIMENTS[experiment]
    config = write_config(folder / "inputs")
    whole = undisturbed(folder, f"--config={config}", "--config.train.log_records=True", "--config.train.save_every=5")
    assert [line["step"] for line in read_metrics(whole.workdir)] == list(range(2, 33, 2))
    return whole


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Run:
    return whole_run(tmp_path_factory.mktemp("tokenizer"), "tokenizer")


@pytest.fixture(scope="module")
def hart(tmp_path_factory) -> Run:
    return whole_run(tmp_path_factory.mktemp("hart"), "hart")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_killed_three_times_the_log_is_that_of_an_undisturbed_run(request, tmp_path, experiment):
    _, fields = EXPERIMENTS[experiment]
    whole, settings = request.getfixturevalue(experiment)
    killed = tmp_path / "killed"
    again = (*settings, f"--workdir={killed}")

    # Between two checkpoints, the one before perhaps not yet complete.
    kill_when(start(*again), lambda: logged_steps(killed) >= 12)
    # While it starts: the checkpoint is restored, and the log is cut back to it.
    with start(*again) as process:
        announcement = process.stdout.readline()
        process.kill()
    resumed = re.search(r"(starting|resuming) at step (\d+) of 32", announcement)
    assert resumed, announcement
    # While it saves, further on.
    further = int(resumed[2]) + 12
    kill_when(start(*again), lambda: logged_steps(killed) >= further and unfinished_saves(killed))

    code, out, err = run_to_end(*again)
    assert code == 0, err
    assert "resuming at" in out
    assert_same_run(killed, whole, fields)
    assert load_config(whole) == load_config(killed)
    assert [line["step"] for line in read_metrics(whole, TIMINGS_FILE)] == list(range(2, 33, 2))
    records = [index for line in read_metrics(whole, RECORDS_FILE) for index in line["index"]]
    # Epochs of 14 images, each exactly once in every one of them.
    assert len(records) == 32 * 4
    assert all(sorted(records[first : first + 14]) == list(range(14)) for first in range(0, 126, 14))


@pytest.mark.slow
def test_asked_to_end_it_saves_and_goes_on_where_it_was(tmp_path, tokenizer):
    _, fields = EXPERIMENTS["tokenizer"]
    whole, settings = tokenizer
    again = (*settings, f"--workdir={tmp_path}")

    process = start(*again)
    code, out, err = signal_when(process, lambda: logged_steps(tmp_path) >= 6, signal.SIGTERM)
    assert code == 143, err
    first = int(re.search(r"saved step (\d+); the same command resumes there", out)[1])
    assert 6 <= first < 32 and (tmp_path / CHECKPOINT_DIR / str(first)).is_dir()

    process = start(*again)
    code, out, err = signal_when(process, lambda: logged_steps(tmp_path) > first, signal.SIGINT)
    assert code == 130, err
    assert f"resuming at step {first} of 32" in out
    second = int(re.search(r"saved step (\d+); the same command resumes there", err)[1])
    assert first < second < 32 and "Traceback" not in err

    code, out, err = run_to_end(*again)
    assert code == 0, err
    assert f"resuming at step {second} of 32" in out
    assert (tmp_path / METRICS).read_bytes() == (whole / METRICS).read_bytes()
    for field in fields:
        jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, field), load_params(whole, field))


@pytest.mark.slow
def test_a_checkpoint_torn_on_disk_is_passed_over(tmp_path, tokenizer):
    workdir = tmp_path / "run"
    shutil.copytree(tokenizer.workdir, workdir)
    log, params = (workdir / METRICS).read_bytes(), load_params(workdir, "model.params")
    latest = workdir / CHECKPOINT_DIR / "32"
    arrays = max((path for path in latest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(arrays, arrays.stat().st_size // 2)

    code, out, err = run_to_end(*tokenizer.settings, f"--workdir={workdir}")
    assert code == 0, err
    assert f"warning: checkpoint {latest} cannot be read" in out
    assert "resuming at step 30 of 32" in out
    assert [run["step"] for run in read_metrics(workdir, RUNS_FILE)] == [0, 30]
    assert (workdir / METRICS).read_bytes() == log
    jax.tree.map(np.testing.assert_array_equal, load_params(workdir, "model.params"), params)
