"""Training killed with SIGKILL and rerun ends with the bits of an undisturbed run."""

import functools
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from hart_jax.checkpoint import CHECKPOINT_DIR, load_config, load_params
from hart_jax.training.manifest import RUNS_FILE
from hart_jax.training.metrics import RECORDS_FILE, SAMPLES_DIR, TIMINGS_FILE, read_metrics
from tests.train_runs import (
    METRICS,
    kill_when,
    logged_steps,
    run_to_end,
    signal_when,
    start,
    write_hart_config,
    write_tokenizer_config,
)

# What writes a config file of 32 steps (logged every 2nd, saved every 4th) and its inputs into a folder, and the fields
# of the state to compare.
EXPERIMENTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "tokenizer": (write_tokenizer_config, ("model.params", "model.ema", "code_usage_V")),
    "hart": (write_hart_config, ("params", "ema")),
    "hart_muon": (functools.partial(write_hart_config, ahead=True, muon=1e-2), ("params", "ema")),
}


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    folder = workdir / CHECKPOINT_DIR
    return folder.exists() and any(not path.name.isdigit() for path in folder.iterdir())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_killed_three_times_the_log_is_that_of_an_undisturbed_run(tmp_path, experiment):
    write_config, fields = EXPERIMENTS[experiment]
    config = write_config(tmp_path / "inputs")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = (f"--config={config}", "--config.train.log_records=True")
    code, _, err = run_to_end(*settings, f"--workdir={whole}")
    assert code == 0, err
    again = (*settings, f"--workdir={killed}")

    # Between two checkpoints, the one before perhaps not yet complete.
    kill_when(start(*again), lambda: logged_steps(killed) >= 10)
    # While it starts: the checkpoint is restored, and the log is cut back to it.
    with start(*again) as process:
        announcement = process.stdout.readline()
        process.kill()
    resumed = re.search(r"(starting|resuming) at step (\d+) of 32", announcement)
    assert resumed, announcement
    # While it saves, further on.
    further = int(resumed[2]) + 10
    kill_when(start(*again), lambda: logged_steps(killed) >= further and saving(killed))

    code, out, err = run_to_end(*again)
    assert code == 0, err
    assert "resuming at" in out
    assert [line["step"] for line in read_metrics(whole)] == list(range(2, 33, 2))
    assert (killed / METRICS).read_bytes() == (whole / METRICS).read_bytes()
    assert (killed / RECORDS_FILE).read_bytes() == (whole / RECORDS_FILE).read_bytes()
    for field in fields:
        jax.tree.map(np.testing.assert_array_equal, load_params(killed, field), load_params(whole, field))
    pictures = sorted(path.name for path in (whole / SAMPLES_DIR).iterdir())
    assert pictures and pictures == sorted(path.name for path in (killed / SAMPLES_DIR).iterdir())
    for name in pictures:
        assert (whole / SAMPLES_DIR / name).read_bytes() == (killed / SAMPLES_DIR / name).read_bytes()
    assert load_config(whole) == load_config(killed)
    assert [line["step"] for line in read_metrics(whole, TIMINGS_FILE)] == list(range(2, 33, 2))
    records = [index for line in read_metrics(whole, RECORDS_FILE) for index in line["index"]]
    # Epochs of 14 images, each exactly once in every one of them.
    assert len(records) == 32 * 4
    assert all(sorted(records[first : first + 14]) == list(range(14)) for first in range(0, 126, 14))


def test_asked_to_end_it_saves_and_goes_on_where_it_was(tmp_path):
    config = write_tokenizer_config(tmp_path / "inputs")
    # Checkpoints fall between logged steps.
    settings = (f"--config={config}", "--config.train.log_every=5", "--config.train.save_every=7")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    code, _, err = run_to_end(*settings, f"--workdir={whole}")
    assert code == 0, err
    again = (*settings, f"--workdir={stopped}")

    process = start(*again)
    code, out, err = signal_when(process, lambda: logged_steps(stopped) >= 5, signal.SIGTERM)
    assert code == 0, err
    first = int(re.search(r"saved step (\d+); the same command resumes there", out)[1])
    assert 5 <= first < 32 and (stopped / CHECKPOINT_DIR / str(first)).is_dir()

    process = start(*again)
    code, out, err = signal_when(process, lambda: logged_steps(stopped) > first, signal.SIGINT)
    assert code == 130, err
    assert f"resuming at step {first} of 32" in out
    second = int(re.search(r"saved step (\d+); the same command resumes there", err)[1])
    assert first < second < 32 and "Traceback" not in err

    code, out, err = run_to_end(*again)
    assert code == 0, err
    assert f"resuming at step {second} of 32" in out
    assert [line["step"] for line in read_metrics(whole)] == [5, 10, 15, 20, 25, 30, 32]
    assert (stopped / METRICS).read_bytes() == (whole / METRICS).read_bytes()
    for field in ("model.params", "model.ema", "code_usage_V"):
        jax.tree.map(np.testing.assert_array_equal, load_params(stopped, field), load_params(whole, field))


def test_a_checkpoint_torn_on_disk_is_passed_over(tmp_path):
    config = write_tokenizer_config(tmp_path / "inputs")
    workdir = tmp_path / "run"
    again = (f"--config={config}", f"--workdir={workdir}")
    code, _, err = run_to_end(*again)
    assert code == 0, err
    log, params = (workdir / METRICS).read_bytes(), load_params(workdir, "model.params")
    latest = workdir / CHECKPOINT_DIR / "32"
    arrays = max((path for path in latest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(arrays, arrays.stat().st_size // 2)

    code, out, err = run_to_end(*again)
    assert code == 0, err
    assert f"warning: checkpoint {latest} cannot be read" in out
    assert "resuming at step 28 of 32" in out
    assert [run["step"] for run in read_metrics(workdir, RUNS_FILE)] == [0, 28]
    assert (workdir / METRICS).read_bytes() == log
    jax.tree.map(np.testing.assert_array_equal, load_params(workdir, "model.params"), params)
