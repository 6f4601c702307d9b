"""Training killed with SIGKILL and rerun ends with the bits of an undisturbed run."""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from hart_jax.checkpoint import CHECKPOINT_DIR, load_config, load_params
from hart_jax.training.metrics import SAMPLES_DIR, read_metrics
from tests.train_runs import (
    METRICS,
    kill_when,
    logged_steps,
    run_to_end,
    start,
    write_hart_config,
    write_tokenizer_config,
)

# What writes a config file of 32 steps (logged every 2nd, saved every 4th) and its inputs into a folder, and the fields
# of the state to compare.
EXPERIMENTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "tokenizer": (write_tokenizer_config, ("model.params", "model.ema", "code_usage_V")),
    "hart": (write_hart_config, ("params", "ema")),
}


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    folder = workdir / CHECKPOINT_DIR
    return folder.exists() and any(not path.name.isdigit() for path in folder.iterdir())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_killed_three_times_the_log_is_that_of_an_undisturbed_run(tmp_path, experiment):
    write_config, fields = EXPERIMENTS[experiment]
    config = write_config(tmp_path / "inputs")
    whole, killed, cache = tmp_path / "whole", tmp_path / "killed", tmp_path / "cache"
    code, _, err = run_to_end(f"--config={config}", f"--workdir={whole}", cache=cache)
    assert code == 0, err
    again = (f"--config={config}", f"--workdir={killed}")

    # Between two checkpoints, the one before perhaps not yet complete.
    kill_when(start(*again, cache=cache), lambda: logged_steps(killed) >= 10)
    # While it starts: the checkpoint is restored, and the log is cut back to it.
    with start(*again, cache=cache) as process:
        announcement = process.stdout.readline()
        process.kill()
    resumed = re.search(r"(starting|resuming) at step (\d+) of 32", announcement)
    assert resumed, announcement
    # While it saves, further on.
    further = int(resumed[2]) + 10
    kill_when(start(*again, cache=cache), lambda: logged_steps(killed) >= further and saving(killed))

    code, out, err = run_to_end(*again, cache=cache)
    assert code == 0, err
    assert "resuming at" in out
    assert [line["step"] for line in read_metrics(whole)] == list(range(2, 33, 2))
    assert (killed / METRICS).read_bytes() == (whole / METRICS).read_bytes()
    for field in fields:
        jax.tree.map(np.testing.assert_array_equal, load_params(killed, field), load_params(whole, field))
    pictures = sorted(path.name for path in (whole / SAMPLES_DIR).iterdir())
    assert pictures and pictures == sorted(path.name for path in (killed / SAMPLES_DIR).iterdir())
    for name in pictures:
        assert (whole / SAMPLES_DIR / name).read_bytes() == (killed / SAMPLES_DIR / name).read_bytes()
    assert load_config(whole) == load_config(killed)
