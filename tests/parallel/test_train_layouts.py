"""However the devices are laid out, over however many processes, and wherever a training goes on, it computes the same.

Each run logs the losses and records of every step and samples two grids; one on a single device is what the others are
held against.
"""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from hart_jax.checkpoints.orbax import load_params
from hart_jax.io.run_info import RUNS_FILE
from hart_jax.training.metrics import RECORDS_FILE, SAMPLES_DIR, read_metrics
from tests.train_runs import (
    Run,
    logged_steps,
    outcome,
    run_to_end,
    start_job,
    undisturbed,
    write_hart_config,
    write_tokenizer_config,
)

# Twelve whole epochs; the tokenizer's run is of five steps.
STEPS, BATCH, IMAGES = 21, 8, 14
ACCUMULATE = "--config.train.accumulate=2"


def reference(folder: Path, write_config: Callable[[Path], Path], steps: int, *more: str) -> Run:
    """Two grids, of fewer prompts or test images than the parts that most of the meshes split a batch into."""
    run = undisturbed(
        folder,
        f"--config={write_config(folder / 'inputs')}",
        *more,
        f"--config.train.steps={steps}",
        f"--config.train.batch_size={BATCH}",
        f"--config.train.save_every={steps}",
        f"--config.train.sample_every={(steps + 1) // 2}",
        "--config.train.log_every=1",
        "--config.train.log_records=True",
    )
    assert len(grids(run.workdir)) == 2 and len(read_metrics(run.workdir)) == steps
    return run


@pytest.fixture(scope="module")
def hart(tmp_path_factory) -> Run:
    """Captions are encoded on the fly, by all devices."""
    return reference(tmp_path_factory.mktemp("hart"), write_hart_config, STEPS, "--config.precompute_text=False")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Run:
    return reference(tmp_path_factory.mktemp("tokenizer"), write_tokenizer_config, 5)


def mesh(data: int, fsdp: int, tensor: int) -> list[str]:
    return [f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}"]


def grids(workdir: Path) -> dict[str, np.ndarray]:
    """The images of a training by the names of their files, uint8."""
    return {path.name: np.asarray(Image.open(path)) for path in sorted((workdir / SAMPLES_DIR).glob("*.png"))}


def assert_same_grids(workdir: Path, expected: Path) -> None:
    ours, theirs = grids(workdir), grids(expected)
    assert list(ours) == list(theirs)
    for name, tiles in theirs.items():
        # Sums in another order may round a colour otherwise.
        np.testing.assert_allclose(ours[name].astype(int), tiles.astype(int), atol=1, err_msg=name)


def assert_same_history(workdir: Path, expected: Path) -> None:
    ours, theirs = read_metrics(workdir), read_metrics(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, len(theirs) + 1))
    for ours_then, theirs_then in zip(ours, theirs, strict=True):
        for name in ("loss", "loss_token", "loss_diffusion", "mse", "vq"):
            if name in theirs_then:
                np.testing.assert_allclose(
                    ours_then[name], theirs_then[name], rtol=1e-5, err_msg=f"{name} at {ours_then['step']}"
                )
    assert (workdir / RECORDS_FILE).read_bytes() == (expected / RECORDS_FILE).read_bytes()


@pytest.mark.parametrize(
    ("kind", "processes", "sizes", "more"),
    [
        ("hart", 1, (2, 2, 2), [ACCUMULATE]),
        pytest.param("hart", 2, (2, 2, 2), [], marks=pytest.mark.slow),
        pytest.param("tokenizer", 2, (2, 2, 2), [], marks=pytest.mark.slow),
    ],
)
def test_eight_devices_train_as_one_does(request, tmp_path, kind, processes, sizes, more):
    expected, settings = request.getfixturevalue(kind)
    arguments = (*settings, *mesh(*sizes), *more, f"--workdir={tmp_path}")
    code, _, err = run_to_end(*arguments, processes=processes, devices=8 // processes)
    assert code == 0, err
    assert_same_history(tmp_path, expected)
    assert_same_grids(tmp_path, expected)


# Processes, devices of each, and the mesh of every start; in the last both processes hold all rows.
STARTS = [(2, 4, (2, 4, 1)), (1, 4, (-1, 2, 2)), (2, 1, (1, 1, 2))]


@pytest.mark.slow
def test_a_training_goes_on_over_other_meshes_and_processes(tmp_path, hart):
    saved = 0
    for number, (processes, devices, sizes) in enumerate(STARTS, 1):
        arguments = (*hart.settings, *mesh(*sizes), f"--workdir={tmp_path}")
        job = start_job(*arguments, processes=processes, devices=devices)
        if number < len(STARTS):
            while logged_steps(tmp_path) < saved + 3 and job[0].poll() is None:
                time.sleep(0.001)
            job[-1].send_signal(signal.SIGTERM)
        code, out, err = outcome(job)
        assert code == (143 if number < len(STARTS) else 0), err
        assert f"at step {saved} of {STEPS}" in out
        if number < len(STARTS):
            saved = int(re.search(r"saved step (\d+); the same command resumes there", out)[1])

    runs = read_metrics(tmp_path, RUNS_FILE)
    assert [(run["processes"], run["devices"]) for run in runs] == [(count, count * each) for count, each, _ in STARTS]
    assert 0 == runs[0]["step"] < runs[1]["step"] < runs[2]["step"] < STEPS
    assert_same_history(tmp_path, hart.workdir)
    assert_same_grids(tmp_path, hart.workdir)
    ours, theirs = (load_params(workdir, "params") for workdir in (tmp_path, hart.workdir))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)
    records = [index for line in read_metrics(tmp_path, RECORDS_FILE) for index in line["index"]]
    assert len(records) == STEPS * BATCH
    for first in range(0, STEPS * BATCH, IMAGES):
        assert sorted(records[first : first + IMAGES]) == list(range(IMAGES))
