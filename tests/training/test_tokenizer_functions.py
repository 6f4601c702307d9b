"""A tokenizer's start: what it holds at a time does not grow with the batch."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from hart_jax.config import MeshConfig, TokenizerExperiment, read_experiment
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.training import tokenizer_task
from hart_jax.training.rounds import MAX_PIXELS
from hart_jax.training.tokenizer_functions import tokenizer_functions
from hart_jax.training.tokenizer_task import TokenizerTask
from tests.tiny import TOKENIZER
from tests.train_runs import ROOT, make_shards


def arrays_of(jaxpr: Jaxpr) -> Iterator[Any]:
    """The shapes of all that a traced function computes, inner functions included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from arrays_of(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def test_a_few_images_are_encoded_at_a_time():
    experiment = read_experiment(ROOT / "configs" / "var_tokenizer.py")
    assert isinstance(experiment, TokenizerExperiment)
    config = experiment.tokenizer
    program = tokenizer_functions(experiment, MeshLayout.of(MeshConfig(), experiment.train.batch_size))
    images = jax.ShapeDtypeStruct((64, config.image_size, config.image_size, 3), jnp.uint8)
    traced = program.init.trace(images, 64)
    # The widest activations are those of the first level, of as many pixels as are encoded at a time.
    widest = 4 * MAX_PIXELS * config.channels * config.channel_multipliers[0]
    held = [4 * math.prod(array.shape) for array in arrays_of(traced.jaxpr.jaxpr) if hasattr(array, "shape")]
    assert widest / 2 < max(held) <= widest
    assert sum(const.size for const in traced.jaxpr.consts) < 2**20


def experiment(folder, batch_size: int) -> TokenizerExperiment:
    shards = str(make_shards(folder, batch_size, seed=0))
    values = {
        "tokenizer": dataclasses.asdict(TOKENIZER),
        "loss": {"perceptual": 0.0, "adversarial": 0.0},
        "data": {"train": shards, "test": shards},
        "train": {"batch_size": batch_size},
    }
    return TokenizerExperiment.from_dict(values)


def test_a_start_takes_the_same_images_of_a_large_batch(tmp_path, monkeypatch):
    seen = {}

    def recording(*arguments):
        def init(images, count):
            seen.update(shape=images.shape, count=count)

        return dataclasses.replace(tokenizer_functions(*arguments), init=init)

    monkeypatch.setattr(tokenizer_task, "tokenizer_functions", recording)
    TokenizerTask(experiment(tmp_path, 96), MeshLayout.of(MeshConfig(), 96)).init_state()
    assert seen == {"shape": (64, 8, 8, 3), "count": 64}


@pytest.mark.slow
def test_images_that_fill_up_a_mesh_give_no_codes(tmp_path):
    program = tokenizer_functions(experiment(tmp_path, 4), MeshLayout.of(MeshConfig(), 4))
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    filled = images.copy()
    filled[4:] = 0
    few, more = (program.init(given, 4).model.params["quantizer"]["codebook"] for given in (images[:4], filled))
    np.testing.assert_allclose(few, more, rtol=1e-5, atol=1e-6)
