"""`import hart_jax`: what it offers to a notebook, and that it costs nothing until it is used."""

import subprocess
import sys

import numpy as np
import pytest

import hart_jax
from hart_jax.checkpoints.model_folder import write_model
from hart_jax.config import SampleConfig
from hart_jax.errors import UserError
from hart_jax.sampling.pipeline import Pipeline
from tests.tiny import tiny_model

SETTINGS = SampleConfig(cfg=2.0, top_k=4, top_k_late=4, temperature=0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a class-conditional model that knows its settings, and what these sample from it."""
    folder = tmp_path_factory.mktemp("api") / "model"
    tiny = tiny_model(num_classes=3, context_tokens=1)
    write_model(folder, hart_jax.Model(**{**vars(tiny), "sampling": SETTINGS}))
    return folder, Pipeline(tiny, SETTINGS)([1], seed=2)


def test_load_knows_the_settings_of_a_model(model):
    folder, expected = model
    pipe = hart_jax.load(folder)
    np.testing.assert_array_equal(pipe(1, seed=2), expected)
    assert (hart_jax.load(folder, temperature=2.0, top_k=0)(1, seed=2) != expected).any()


def test_settings_of_a_pipeline_are_seen_and_not_set(model):
    pipe = hart_jax.load(model[0], cfg=3.0)
    assert pipe.settings.cfg == 3.0 and pipe.settings.top_k == SETTINGS.top_k
    with pytest.raises(AttributeError, match="settings"):
        pipe.settings = SETTINGS


def test_a_setting_that_is_not_one_is_named(model):
    with pytest.raises(UserError, match="unknown key temprature"):
        hart_jax.load(model[0], temprature=1.0)
    with pytest.raises(UserError, match="the codebook has"):
        hart_jax.load(model[0], top_k=5000)


def test_all_that_is_offered_is_there():
    assert {"load", "Hart", "Tokenizer", "SampleConfig"} <= set(dir(hart_jax))
    for name in dir(hart_jax):
        assert getattr(getattr(hart_jax, name), "__name__", name) == name
    with pytest.raises(AttributeError, match=r"no attribute 'laod'; it offers load, "):
        hart_jax.laod  # noqa: B018


def test_the_package_alone_imports_nothing():
    code = "import hart_jax, sys; sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
