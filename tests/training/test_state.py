"""Optimiser and average: schedule values, decay on matrices only, warm-up of the average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hart_jax.config import OptimizerConfig
from hart_jax.training.state import apply_gradients, compute_dtype, learning_rate_schedule, make_optimizer, new_state


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (500, 0.1)],
)
def test_cosine_schedule(step, expected):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    np.testing.assert_allclose(learning_rate_schedule(config, 110)(step), expected, atol=1e-6)


@pytest.mark.parametrize(("warmup", "step", "expected"), [(10, 5, 0.5), (10, 10, 1.0), (10, 999, 1.0), (0, 0, 1.0)])
def test_constant_schedule(warmup, step, expected):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=warmup, schedule="constant")
    np.testing.assert_allclose(learning_rate_schedule(config, 20)(step), expected, atol=1e-6)


def test_a_run_shorter_than_its_warm_up_has_a_schedule():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    np.testing.assert_allclose([learning_rate_schedule(config, 5)(step) for step in (0, 4)], [0.0, 0.4], atol=1e-6)


def test_only_matrices_decay():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5)
    params = {
        "dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
        "codebook": jnp.ones((5, 2)),
        "norm": {"scale": jnp.ones(4)},
        # Those of stacked layers and of several heads have more axes, and are biases and scales all the same.
        "layers": {"norm_scale": jnp.ones((2, 4)), "q_bias": jnp.ones((2, 3, 4)), "kernel": jnp.ones((2, 4, 4))},
    }
    optimizer = make_optimizer(config, 10)
    state = apply_gradients(new_state(params, optimizer), jax.tree.map(jnp.zeros_like, params), optimizer, 0.9)
    decayed = jax.tree.map(lambda leaf: bool(jnp.all(leaf < 1)), state.params)
    assert decayed == {
        "dense": {"kernel": True, "bias": False},
        "codebook": True,
        "norm": {"scale": False},
        "layers": {"norm_scale": False, "q_bias": False, "kernel": True},
    }
    np.testing.assert_allclose(state.params["dense"]["kernel"], np.full((3, 4), 0.95), atol=1e-6)


def test_gradients_are_clipped_by_their_common_norm():
    config = OptimizerConfig(warmup_steps=0, clip_norm=1.0, b1=0.0, weight_decay=0.0, schedule="constant")
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    optimizer = make_optimizer(config, 10)
    grads = {"a": jnp.array([30.0, 0.0]), "b": jnp.array([0.0, 40.0])}
    state = apply_gradients(new_state(params, optimizer), grads, optimizer, 0.9)
    second_moments = [optax.tree_utils.tree_get(state.opt_state, "nu")[name] for name in ("a", "b")]
    np.testing.assert_allclose(np.sqrt(np.array(second_moments) / 0.05), [[0.6, 0.0], [0.0, 0.8]], atol=1e-4)


def test_average_warms_up():
    optimizer = optax.sgd(1.0)
    state = new_state({"w": jnp.zeros(())}, optimizer)
    expected = 0.0
    for step in range(4):
        state = apply_gradients(state, {"w": jnp.float32(-1.0)}, optimizer, ema_decay=0.25)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
        np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-6)
    assert int(state.step) == 4


def test_average_is_a_buffer_of_its_own():
    params = {"w": jnp.ones(3)}
    state = new_state(params, optax.sgd(1.0))
    assert state.ema["w"].unsafe_buffer_pointer() != state.params["w"].unsafe_buffer_pointer()


def test_compute_dtype():
    assert compute_dtype("float32") == jnp.float32
    assert compute_dtype("bfloat16") == jnp.bfloat16
    narrow = jax.default_backend() in ("tpu", "gpu")
    assert compute_dtype("auto") == (jnp.bfloat16 if narrow else jnp.float32)
