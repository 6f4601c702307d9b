"""Training the tokenizer against the discriminator: laid out over a mesh, saved, and resumed on another one."""

import numpy as np
import pytest

from hart_jax.checkpoints.orbax import load_params
from hart_jax.data.shards import write_shards
from hart_jax.training.metrics import SAMPLES_DIR, read_metrics
from tests.train_runs import ROOT, run_to_end, write_tokenizer_config


@pytest.mark.slow
def test_the_discriminator_is_laid_out_saved_and_resumed(tmp_path):
    config = write_tokenizer_config(tmp_path / "inputs")
    write_shards(ROOT / "tests" / "emoji", tmp_path / "emoji", records_per_shard=8)
    settings = (
        f"--config={config}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.train={tmp_path / 'emoji'}",
        # The smallest that the discriminator takes.
        "--config.tokenizer.image_size=24",
        "--config.tokenizer.patch_nums=(1, 4, 12)",
        "--config.loss.adversarial=0.1",
        "--config.loss.adversarial_start=0",
        "--config.train.log_every=1",
        "--config.train.sample_every=1",
    )
    over_four = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.train.steps=1")
    code, _, err = run_to_end(*settings, *over_four, devices=4)
    assert code == 0, err
    assert len(list((tmp_path / "run" / SAMPLES_DIR).iterdir())) == 1
    before = load_params(tmp_path / "run", "disc.params")
    code, out, err = run_to_end(*settings, "--config.train.steps=2")
    assert code == 0, err
    assert "resuming at step 1 of 2" in out

    after = load_params(tmp_path / "run", "disc.params")
    assert np.any(before["conv_0"]["kernel"] != after["conv_0"]["kernel"])
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 2
    assert all(np.isfinite(line["discriminator"]) and not line["skipped_steps"] for line in lines)
