"""Optimiser and average: schedule values, decay on matrices only, warm-up of the average."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from hart_jax.checkpoints.model_folder import abstract_transformer
from hart_jax.config import OptimizerConfig
from hart_jax.nn.dtypes import compute_dtype
from hart_jax.training.state import (
    Optimizer,
    apply_gradients,
    learning_rate_schedule,
    make_optimizer,
    new_state,
)
from tests.quickly import HAS_OLDER_EMITTERS
from tests.tiny import random_like, transformer_config

LOSS = jnp.float32(1.0)
ONE = optax.constant_schedule(1.0)
SGD = Optimizer(*optax.sgd(ONE), ONE)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (500, 0.1)],
)
def test_cosine_schedule(step, expected):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    np.testing.assert_allclose(learning_rate_schedule(config, 110)(step), expected, atol=1e-6)


@pytest.mark.parametrize(("step", "expected"), [(5, 0.5), (10, 1.0), (35, 0.775), (110, 0.1), (500, 0.1)])
def test_linear_schedule(step, expected):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1, schedule="linear")
    np.testing.assert_allclose(learning_rate_schedule(config, 110)(step), expected, atol=1e-6)


@pytest.mark.parametrize(("warmup", "step", "expected"), [(10, 5, 0.5), (10, 10, 1.0), (10, 999, 1.0), (0, 0, 1.0)])
def test_constant_schedule(warmup, step, expected):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=warmup, schedule="constant")
    np.testing.assert_allclose(learning_rate_schedule(config, 20)(step), expected, atol=1e-6)


def test_a_run_shorter_than_its_warm_up_has_a_schedule():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    np.testing.assert_allclose([learning_rate_schedule(config, 5)(step) for step in (0, 4)], [0.0, 0.4], atol=1e-6)


def test_an_infinite_learning_rate_changes_nothing():
    """The loss and the gradients are finite here."""
    rate = optax.constant_schedule(float("inf"))
    optimizer = Optimizer(*optax.adam(rate), rate)
    state = new_state({"w": jnp.ones(3)}, optimizer)
    after, metrics = jax.jit(lambda s: apply_gradients(s, {"w": jnp.ones(3)}, LOSS, optimizer, 0.9))(state)
    assert metrics["skipped_steps"] == 1
    jax.tree.map(np.testing.assert_array_equal, after, state.replace(step=state.step + 1))


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
    grads = jax.tree.map(jnp.zeros_like, params)
    state, _ = apply_gradients(new_state(params, optimizer), grads, LOSS, optimizer, 0.9)
    decayed = jax.tree.map(lambda leaf: bool(jnp.all(leaf < 1)), state.params)
    assert decayed == {
        "dense": {"kernel": True, "bias": False},
        "codebook": True,
        "norm": {"scale": False},
        "layers": {"norm_scale": False, "q_bias": False, "kernel": True},
    }
    np.testing.assert_allclose(state.params["dense"]["kernel"], np.full((3, 4), 0.95), atol=1e-6)


def test_muon_orthogonalises_the_matrices_of_the_blocks_and_adamw_moves_the_rest():
    config = OptimizerConfig(
        learning_rate=1e-3,
        muon_learning_rate=1e-2,
        warmup_steps=0,
        schedule="constant",
        weight_decay=0.0,
        clip_norm=1e9,
    )
    params = jax.tree.map(
        jnp.asarray, random_like(abstract_transformer(transformer_config(disable_aln=False, attn_l2_norm=True)))
    )
    grads = random_like(params, seed=3)
    moved = {}
    for name, changes in (("muon", {}), ("adamw", {"muon_learning_rate": 0.0})):
        optimizer = make_optimizer(dataclasses.replace(config, **changes), 10)
        move = jax.jit(functools.partial(apply_gradients, optimizer=optimizer, ema_decay=0.9))
        state, _ = move(new_state(params, optimizer), grads, LOSS)
        moved[name] = jax.tree.map(lambda after, before: np.asarray(after - before), state.params, params)
    muon, adamw = (traverse_util.flatten_dict(moved[name], sep="/") for name in ("muon", "adamw"))
    different = {name for name in muon if not np.allclose(muon[name], adamw[name], rtol=1e-3, atol=1e-7)}
    assert different == {
        "layers/attn/qkv",
        "layers/attn/proj/kernel",
        "layers/mlp/gate/kernel",
        "layers/mlp/up/kernel",
        "layers/mlp/down/kernel",
    }
    # One matrix each of q, k and v of every layer; Newton-Schulz leaves singular values near 1.
    qkv = muon["layers/attn/qkv"]
    for matrix in (qkv[0, :, 0].reshape(16, 16), qkv[1, :, 2].reshape(16, 16), muon["layers/mlp/up/kernel"][1]):
        values = np.linalg.svd(matrix, compute_uv=False) / (1e-2 * 0.2 * max(matrix.shape) ** 0.5)
        assert values[0] < 1.4 and np.median(values) > 0.6, values


def test_gradients_are_clipped_by_their_common_norm():
    config = OptimizerConfig(warmup_steps=0, clip_norm=1.0, b1=0.0, weight_decay=0.0, schedule="constant")
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    optimizer = make_optimizer(config, 10)
    grads = {"a": jnp.array([30.0, 0.0]), "b": jnp.array([0.0, 40.0])}
    state, _ = apply_gradients(new_state(params, optimizer), grads, LOSS, optimizer, 0.9)
    second_moments = [optax.tree_utils.tree_get(state.opt_state, "nu")[name] for name in ("a", "b")]
    np.testing.assert_allclose(np.sqrt(np.array(second_moments) / 0.05), [[0.6, 0.0], [0.0, 0.8]], atol=1e-4)


def test_average_warms_up():
    optimizer = SGD
    state = new_state({"w": jnp.zeros(())}, optimizer)
    expected = 0.0
    for step in range(4):
        state, _ = apply_gradients(state, {"w": jnp.float32(-1.0)}, LOSS, optimizer, ema_decay=0.25)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
        np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-6)
    assert int(state.step) == 4


def test_a_step_that_is_not_finite_is_as_if_it_had_not_been():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, muon_learning_rate=0.01, warmup_steps=4), 10)
    params = {"layers": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}, "kernel": jnp.ones((4, 4))}
    good = jax.tree.map(jnp.ones_like, params)
    step = jax.jit(lambda *arguments: apply_gradients(*arguments, optimizer, 0.9))
    state, _ = step(new_state(params, optimizer), good, LOSS)
    for number, (loss, gradient) in enumerate(((jnp.nan, 1.0), (jnp.inf, 1.0), (1.0, jnp.nan), (1.0, -jnp.inf)), 2):
        bad = {**good, "layers": {**good["layers"], "bias": good["layers"]["bias"].at[1, 2].set(gradient)}}
        skipped, metrics = step(state.replace(step=number - 1), bad, jnp.float32(loss))
        assert float(metrics["skipped_steps"]) == 1
        assert int(skipped.step) == number
        jax.tree.map(np.testing.assert_array_equal, skipped.replace(step=state.step), state)
    # The learning rate goes on where it was: warm-up does not pass with steps that do nothing.
    after, metrics = step(skipped, good, LOSS)
    assert float(metrics["skipped_steps"]) == 0
    np.testing.assert_allclose(metrics["learning_rate"], 0.1 / 4)
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(after.params))
    moved = jax.tree.map(lambda new, old: new - old, after.params, skipped.params)
    np.testing.assert_allclose(metrics["update_norm"], optax.tree.norm(moved), rtol=1e-4)


def test_finite_steps_move_by_the_plain_rule_to_the_last_bit():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=2), 10)
    random = np.random.default_rng(0)

    def draw() -> dict[str, jax.Array]:
        return {"kernel": jnp.asarray(random.normal(size=(7, 9)), jnp.float32), "bias": jnp.ones(9)}

    # As for users: XLA's older emitters round two programs of one rule apart.
    jit = functools.partial(
        jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True} if HAS_OLDER_EMITTERS else None
    )

    @jit
    def plain(params, ema, opt_state, grads, step):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(0.9, (1.0 + step) / (10.0 + step))
        return params, jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params), opt_state

    guarded = jit(lambda *arguments: apply_gradients(*arguments, optimizer, 0.9))
    state = new_state(draw(), optimizer)
    expected = (state.params, state.ema, state.opt_state)
    for step in range(4):
        grads = draw()
        expected = plain(*expected, grads, jnp.int32(step))
        state, _ = guarded(state, grads, LOSS)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.ema, state.opt_state), expected)


def test_average_is_a_buffer_of_its_own():
    params = {"w": jnp.ones(3)}
    state = new_state(params, SGD)
    assert state.ema["w"].unsafe_buffer_pointer() != state.params["w"].unsafe_buffer_pointer()


def test_compute_dtype():
    assert compute_dtype("float32") == jnp.float32
    assert compute_dtype("bfloat16") == jnp.bfloat16
    narrow = jax.default_backend() in ("tpu", "gpu")
    assert compute_dtype("auto") == (jnp.bfloat16 if narrow else jnp.float32)
