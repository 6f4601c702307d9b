"""A training goes on over another mesh and number of processes, with the losses and records it would have had."""

import re
import signal
import time

import jax
import numpy as np

from hart_jax.checkpoint import load_params
from hart_jax.training.manifest import RUNS_FILE
from hart_jax.training.metrics import RECORDS_FILE, read_metrics
from tests.train_runs import logged_steps, outcome, run_to_end, start_job, write_hart_config

# Processes, devices of each, and the mesh (data, fsdp, tensor) of every start; in the last both hold all rows.
STARTS = [(2, 4, (2, 4, 1)), (1, 4, (-1, 2, 2)), (2, 1, (1, 1, 2))]
STEPS, BATCH, IMAGES = 28, 8, 14


def test_it_goes_on_elsewhere(tmp_path):
    config = write_hart_config(tmp_path / "inputs")
    settings = (
        f"--config={config}",
        f"--config.train.steps={STEPS}",
        f"--config.train.batch_size={BATCH}",
        "--config.train.sample_every=100",
        "--config.train.log_every=1",
        "--config.train.log_records=True",
    )
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    code, _, err = run_to_end(*settings, f"--workdir={whole}")
    assert code == 0, err

    saved = 0
    for number, (processes, devices, sizes) in enumerate(STARTS, 1):
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), sizes, strict=True)]
        job = start_job(*settings, *mesh, f"--workdir={moved}", processes=processes, devices=devices)
        if number < len(STARTS):
            while logged_steps(moved) < saved + 3 and job[0].poll() is None:
                time.sleep(0.001)
            job[-1].send_signal(signal.SIGTERM)
        code, out, err = outcome(job)
        assert code == 0, err
        assert f"at step {saved} of {STEPS}" in out
        if number < len(STARTS):
            saved = int(re.search(r"saved step (\d+); the same command resumes there", out)[1])

    runs = read_metrics(moved, RUNS_FILE)
    assert [(run["processes"], run["devices"]) for run in runs] == [(count, count * each) for count, each, _ in STARTS]
    assert 0 == runs[0]["step"] < runs[1]["step"] < runs[2]["step"] < STEPS
    for ours, theirs in zip(read_metrics(moved), read_metrics(whole), strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5, err_msg=f"at {ours['step']}")
    moved_params, whole_params = (load_params(workdir, "params") for workdir in (moved, whole))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-4), moved_params, whole_params)
    assert (moved / RECORDS_FILE).read_bytes() == (whole / RECORDS_FILE).read_bytes()
    records = [index for line in read_metrics(moved, RECORDS_FILE) for index in line["index"]]
    assert len(records) == STEPS * BATCH
    for first in range(0, STEPS * BATCH, IMAGES):
        assert sorted(records[first : first + IMAGES]) == list(range(IMAGES))
