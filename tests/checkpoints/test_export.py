"""From a training workdir to a model folder, and what is refused on the way."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.checkpoints.export import export
from hart_jax.checkpoints.load import check_model, load_model
from hart_jax.checkpoints.model_folder import read_model, write_model
from hart_jax.checkpoints.orbax import Checkpoints
from hart_jax.checkpoints.workdir import load_tokenizer
from hart_jax.config import OptimizerConfig, TokenizerExperiment, TokenizerLossConfig, read_experiment
from hart_jax.errors import UserError
from hart_jax.training.state import make_optimizer, new_state
from tests.tiny import TOKENIZER, tiny_model
from tests.train_runs import write_hart_config


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """A config file and a workdir with one checkpoint, its averages all 0.5."""
    folder = tmp_path_factory.mktemp("export")
    config = write_hart_config(folder)
    experiment = read_experiment(config)
    params = jax.tree.map(jnp.asarray, tiny_model(context_tokens=6, context_dim=24).transformer)
    state = new_state(params, make_optimizer(OptimizerConfig(), 10))
    state = state.replace(ema=jax.tree.map(lambda p: jnp.full_like(p, 0.5), params))
    with Checkpoints(folder / "run", experiment.to_dict()) as checkpoints:
        checkpoints.save(1, state)
    return config, folder / "run"


def test_the_averages_are_exported_with_all_parts(run, tmp_path):
    config, workdir = run
    export(workdir, tmp_path / "model", dtype="bfloat16")
    model = read_model(tmp_path / "model")
    assert all((leaf == 0.5).all() for leaf in jax.tree.leaves(model.transformer))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "sampling.json",
        "text_encoder",
        "tokenizer",
        "transformer",
    ]
    assert model.sampling.image_settings() == read_experiment(config).sample.image_settings()
    check_model(model, read_experiment(config), "model")
    from_workdir = load_model(workdir)
    assert from_workdir.transformer_config == model.transformer_config
    for a, b in zip(jax.tree.leaves(from_workdir.tokenizer), jax.tree.leaves(model.tokenizer), strict=True):
        np.testing.assert_allclose(a, b, rtol=1 / 128)


def test_the_latest_parameters_on_request(run, tmp_path):
    export(run[1], tmp_path / "model", dtype="float32", params="params")
    expected = tiny_model(context_tokens=6, context_dim=24).transformer
    jax.tree.map(np.testing.assert_array_equal, read_model(tmp_path / "model").transformer, expected)


def test_an_existing_folder_stays_as_it_is(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        export(run[1], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_tokenizer_workdir_is_no_model(tmp_path):
    experiment = TokenizerExperiment(tokenizer=TOKENIZER, loss=TokenizerLossConfig(adversarial=0.0, perceptual=0.0))
    with Checkpoints(tmp_path, experiment.to_dict()) as checkpoints:
        checkpoints.save(1, {"model": {"ema": {"a": jnp.zeros(2)}}})
    with pytest.raises(UserError, match="trains a tokenizer"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="checkpoint of another model"):
        load_tokenizer(tmp_path, TOKENIZER)


def test_a_tokenizer_of_another_config_is_named(run, tmp_path):
    model = tiny_model()
    write_model(tmp_path / "model", model)
    path = tmp_path / "model" / "tokenizer" / "config.json"
    path.write_text(json.dumps({**TOKENIZER.to_dict(), "quant_resi": 0.25}))
    with pytest.raises(UserError, match=r"tokenizer\.quant_resi is 0\.25, the config says 0\.5"):
        load_tokenizer(tmp_path / "model", TOKENIZER)
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "model", TOKENIZER)


def test_one_tokenizer_serves_all_image_sizes(run, tmp_path):
    model = tiny_model()
    write_model(tmp_path / "model", model)
    larger = dataclasses.replace(TOKENIZER, image_size=16, patch_nums=(1, 2, 4, 8))
    jax.tree.map(np.testing.assert_array_equal, load_tokenizer(tmp_path / "model", larger), model.tokenizer)
