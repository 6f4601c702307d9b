"""A run whose shards and workdir are in a bucket: an emulator on loopback, the real clients."""

import threading
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from hart_jax.checkpoints.orbax import load_params
from hart_jax.io import bucket_lock
from hart_jax.io.buckets import upload_folder
from hart_jax.io.paths import as_path
from hart_jax.io.run_info import RUNS_FILE
from hart_jax.training.metrics import METRICS_FILE, RECORDS_FILE, TIMINGS_FILE, read_metrics
from tests.bucket import BUCKET, Emulator, emulated_bucket, require_clients
from tests.train_runs import kill_when, outcome, run_to_end, start, write_tokenizer_config

require_clients()

# How long the bucket does not answer.
AWAY_SECONDS = 20


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with emulated_bucket() as running:
        yield running


@pytest.mark.slow
def test_a_run_in_the_bucket_is_killed_and_ends_with_the_bits_of_a_local_one(emulator, tmp_path, monkeypatch):
    config = write_tokenizer_config(tmp_path / "inputs")
    whole, workdir = tmp_path / "whole", as_path(f"{BUCKET}/runs/tiny")
    settings = (f"--config={config}", "--config.train.log_records=True", "--config.train.save_every=8")
    folders = {name: as_path(f"{BUCKET}/tiny/{name}") for name in ("train", "test")}
    for name, folder in folders.items():
        upload_folder(tmp_path / "inputs" / name / "shards", folder)
    there = (*settings, f"--workdir={workdir}", *(f"--config.data.{name}={path}" for name, path in folders.items()))

    kill_when(start(*there), (workdir / "checkpoints" / "8" / "commit_success.txt").exists)
    # It goes on without what the first machine has copied, while the bucket is away for some seconds.
    monkeypatch.setenv("HART_CACHE_DIR", str(tmp_path / "other machine"))
    resumed = start(*there)
    while not (workdir / "checkpoints" / "24" / "_CHECKPOINT_METADATA").exists():
        assert resumed.poll() is None, resumed.communicate()
    emulator.stop()
    threading.Timer(AWAY_SECONDS, emulator.start).start()
    code, out, err = outcome([resumed])
    assert code == 0, err
    assert "resuming at step" in out

    code, _, err = run_to_end(*settings, f"--workdir={whole}")
    assert code == 0, err
    for file in (METRICS_FILE, RECORDS_FILE):
        assert (workdir / file).read_bytes() == (whole / file).read_bytes()
    assert [line["step"] for line in read_metrics(workdir, TIMINGS_FILE)] == list(range(2, 33, 2))
    first, second = (line["step"] for line in read_metrics(workdir, RUNS_FILE))
    assert first == 0 and second in (8, 16, 24)
    for field in ("model.params", "model.ema", "code_usage_V"):
        jax.tree.map(np.testing.assert_array_equal, load_params(workdir, field), load_params(whole, field))
    images = sorted(path.name for path in (whole / "samples").iterdir())
    assert images == sorted(path.name for path in (workdir / "samples").iterdir())
    assert all((whole / "samples" / n).read_bytes() == (workdir / "samples" / n).read_bytes() for n in images)
    assert not (workdir / bucket_lock.OWNER_FILE).exists()
