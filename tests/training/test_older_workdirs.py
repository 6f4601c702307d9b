"""A workdir is opened by its own config.json: the file in configs/ that began it may be another one by now."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from hart_jax.checkpoints.load import read_experiment_of
from hart_jax.checkpoints.orbax import Checkpoints, check_workdir
from hart_jax.config import HartExperiment, read_experiment
from hart_jax.errors import UserError
from hart_jax.training.loop import MAY_CHANGE

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_run_whose_stage_had_a_config_file_of_its_own_is_read_and_goes_on(tmp_path):
    now = read_experiment(CONFIGS / "emoji_hart.py:stage=4").to_dict()
    before = {**now, "init_from": "runs/emoji_hart_more", "tokenizer_from": "runs/emoji_tokenizer_longer"}
    with Checkpoints(tmp_path, before) as checkpoints:
        checkpoints.save(1, {"step": jnp.ones(())})
    assert read_experiment_of(tmp_path) == HartExperiment.from_dict(before)
    assert check_workdir(tmp_path, {**now, "tokenizer_from": before["tokenizer_from"]}, MAY_CHANGE)
    with pytest.raises(UserError, match="tokenizer_from"):
        check_workdir(tmp_path, now, MAY_CHANGE)
