"""Training of the transformer: the loss falls, parts that are frozen stay, subsampling keeps what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hart_jax.config import HartLossConfig, OptimizerConfig
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.training.hart_step import drop_condition, make_hart_step, token_losses
from hart_jax.training.state import make_optimizer, new_state
from hart_jax.transformer.model import Hart
from hart_jax.transformer.subsample import draw_keep_count, draw_kept, keep_buckets
from tests.tiny import TOKENIZER, tiny_model

LOSS = HartLossConfig(condition_top_k=16, min_kept=6, keep_counts=1)


def batch(size: int = 4):
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (size, 8, 8, 3)).astype(np.uint8)
    text = random.normal(size=(size, 4, 8)).astype(np.float32)
    return images, (text, np.tile(np.array([1, 1, 0, 0], np.int32), (size, 1)))


@pytest.fixture(scope="module")
def trained():
    """First and last metrics of some steps on one batch, and the state after them."""
    model = tiny_model()
    hart, tokenizer = Hart(model.transformer_config), Tokenizer(TOKENIZER)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=1, schedule="constant"), 30)
    step = make_hart_step(hart, tokenizer, optimizer, LOSS, 0.9)
    state = new_state(jax.tree.map(jnp.asarray, model.transformer), optimizer)
    images, condition = batch()
    history = []
    for _ in range(30):
        state, metrics = step(state, model.tokenizer, images, condition, jax.random.key(0), 8)
        history.append(jax.device_get(metrics))
    return history, state


def test_the_loss_falls(trained):
    history, state = trained
    early, late = (np.mean([m["loss_token"] for m in part]) for part in (history[:5], history[-5:]))
    assert late < early - 0.3
    assert int(state.step) == 30
    assert all(np.isfinite(m["loss_diffusion"]) for m in history)


def test_every_scale_is_reported(trained):
    assert {f"{kind}_scale_{scale}" for kind in ("loss", "accuracy") for scale in range(3)} <= set(trained[0][0])


def test_token_loss_is_the_mean_over_all_tokens():
    logits = jnp.zeros((2, 5, 16))
    total, metrics = token_losses(logits, [jnp.zeros((2, 1), int), jnp.zeros((2, 4), int)])
    assert float(total) == pytest.approx(np.log(16))
    assert float(metrics["accuracy_scale_1"]) == 1.0


def test_a_dropped_condition_is_the_unconditional_one():
    _, (text, mask) = batch()
    dropped = jnp.array([True, False, False, True])
    text_out, mask_out = drop_condition(Hart(tiny_model().transformer_config), (text, mask), dropped)
    assert not np.asarray(text_out)[[0, 3]].any()
    np.testing.assert_array_equal(np.asarray(text_out)[1], text[1])
    np.testing.assert_array_equal(np.asarray(mask_out)[0], [1, 0, 0, 0])


def test_drawn_keep_counts_follow_the_truncated_normal():
    loss = HartLossConfig(keep_counts=400)
    counts = [draw_keep_count(0, step, 1024, loss) for step in range(2000)]
    assert min(counts) >= 32 and max(counts) <= 512
    # The half-normal below 1 with deviation 0.25, cut at 0.5: its mean is 0.820.
    assert np.mean(counts) / 1024 == pytest.approx(0.18, abs=0.01)


@given(st.integers(16, 4096), st.integers(1, 6), st.integers(0, 50))
def test_keep_counts_are_buckets(positions, keep_counts, step):
    loss = HartLossConfig(min_kept=8, keep_counts=keep_counts)
    buckets = keep_buckets(positions, loss)
    assert len(buckets) <= keep_counts and list(buckets) == sorted(buckets)
    assert draw_keep_count(3, step, positions, loss) in buckets


def test_kept_tokens_are_distinct_ascending_and_differ_between_samples():
    kept = np.asarray(draw_kept(jax.random.key(0), 8, 16, 6))
    assert (np.diff(kept, axis=1) > 0).all() and kept.min() >= 0 and kept.max() < 16
    assert len({tuple(row) for row in kept}) > 1
