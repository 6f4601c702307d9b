"""Training of the transformer: the loss falls, parts that are frozen stay, subsampling keeps what it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hart_jax.config import HartLossConfig, OptimizerConfig
from hart_jax.errors import UserError
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.training import hart_step
from hart_jax.training.hart_step import drop_condition, make_hart_step, token_losses
from hart_jax.training.state import make_optimizer, new_state
from hart_jax.training.token_subsampling import bucket_probabilities, draw_kept_tokens, draw_num_kept, kept_counts
from hart_jax.transformer.model import Hart
from tests.tiny import TOKENIZER, tiny_model

LOSS = HartLossConfig(condition_top_k=16, min_kept=6, keep_counts=1)
MODEL = tiny_model()
TOKENIZER_MODULE = Tokenizer(TOKENIZER)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=1, schedule="constant"), 30)


@functools.cache
def step_with(accumulate: int = 1, mistakes: float = 0.0):
    loss = dataclasses.replace(LOSS, mistakes=mistakes)
    return make_hart_step(
        Hart(MODEL.transformer_config), TOKENIZER_MODULE, OPTIMIZER, loss, 0.9, accumulate=accumulate
    )  # fmt: skip


def new():
    return new_state(jax.tree.map(jnp.asarray, MODEL.transformer), OPTIMIZER)


def batch(size: int = 8):
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (size, 8, 8, 3)).astype(np.uint8)
    text = random.normal(size=(size, 4, 8)).astype(np.float32)
    return images, (text, np.tile(np.array([1, 1, 0, 0], np.int32), (size, 1)))


@pytest.fixture(scope="module")
def trained():
    """First and last metrics of some steps on one batch, and the state after them."""
    state = new()
    images, condition = batch()
    history = []
    for _ in range(30):
        state, metrics = step_with()(state, MODEL.tokenizer, images, condition, jax.random.key(0), 8)
        history.append(jax.device_get(metrics))
    return history, state


def test_the_loss_falls(trained):
    history, state = trained
    early, late = (np.mean([m["loss_token"] for m in part]) for part in (history[:5], history[-5:]))
    assert late < early - 0.3
    assert int(state.step) == 30
    assert all(np.isfinite(m["loss_diffusion"]) for m in history)


def test_tokens_computed_ahead_train_as_their_images_do():
    images, condition = batch()
    metrics = [
        jax.device_get(step_with()(new(), MODEL.tokenizer, source, condition, jax.random.key(0), 8)[1])
        for source in (images, hart_step.tokens_of(TOKENIZER_MODULE, MODEL.tokenizer, images))
    ]
    assert metrics[0].keys() == metrics[1].keys()
    for name in metrics[0]:
        np.testing.assert_allclose(metrics[0][name], metrics[1][name], rtol=1e-4, err_msg=name)


def losses(steps: int, **settings) -> list[dict]:
    """Metrics of some steps on batches that differ."""
    state = new()
    images, condition = batch()
    history = []
    for number in range(steps):
        rows = np.roll(images, number, axis=0)
        state, metrics = step_with(**settings)(state, MODEL.tokenizer, rows, condition, jax.random.key(0), 8)
        history.append(jax.device_get(metrics))
    return history


@pytest.mark.slow
def test_a_batch_in_parts_trains_as_the_whole_one_does():
    accumulated, at_once = losses(4, accumulate=4, mistakes=0.5), losses(4, accumulate=1, mistakes=0.5)
    for parts, whole in zip(accumulated, at_once, strict=True):
        assert parts.keys() == whole.keys()
        for name in whole:
            # A norm is of sums in another order, over all parameters.
            rtol = 1e-4 if name.endswith("_norm") else 1e-5
            np.testing.assert_allclose(parts[name], whole[name], rtol=rtol, atol=1e-7, err_msg=name)


def test_token_corruption_changes_all_scales_but_the_first():
    (without,), (with_some,) = losses(1), losses(1, accumulate=1, mistakes=0.5)
    assert with_some["loss_scale_0"] == pytest.approx(without["loss_scale_0"], rel=1e-5)
    for scale in (1, 2):
        assert abs(with_some[f"loss_scale_{scale}"] - without[f"loss_scale_{scale}"]) > 1e-3


def test_every_scale_is_reported(trained):
    assert {f"{kind}_scale_{scale}" for kind in ("loss", "accuracy") for scale in range(3)} <= set(trained[0][0])


def test_token_loss_is_the_mean_over_all_tokens():
    logits = jnp.zeros((2, 5, 16))
    total, metrics = token_losses(logits, [jnp.zeros((2, 1), int), jnp.zeros((2, 4), int)])
    assert float(total) == pytest.approx(np.log(16))
    assert float(metrics["accuracy_scale_1"]) == 1.0


def test_a_dropped_condition_is_the_unconditional_one():
    _, (text, mask) = batch(4)
    dropped = jnp.array([True, False, False, True])
    text_out, mask_out = drop_condition(Hart(MODEL.transformer_config), (text, mask), dropped)
    assert not np.asarray(text_out)[[0, 3]].any()
    np.testing.assert_array_equal(np.asarray(text_out)[1], text[1])
    np.testing.assert_array_equal(np.asarray(mask_out)[0], [1, 0, 0, 0])


@pytest.mark.slow
def test_every_sample_loses_its_condition_by_itself_one_time_in_ten(monkeypatch):
    drawn = []

    def recorded(hart, condition, dropped_B):
        jax.debug.callback(lambda rows: drawn.append(np.asarray(rows)), dropped_B)
        return drop_condition(hart, condition, dropped_B)

    monkeypatch.setattr(hart_step, "drop_condition", recorded)
    step = make_hart_step(Hart(MODEL.transformer_config), TOKENIZER_MODULE, OPTIMIZER, LOSS, 0.9)
    images, condition = batch(64)
    tokens, state = hart_step.tokens_of(TOKENIZER_MODULE, MODEL.tokenizer, images), new()
    for _ in range(60):
        state, _ = step(state, MODEL.tokenizer, tokens, condition, jax.random.key(0), 8)
    jax.effects_barrier()
    dropped = np.stack(drawn)
    assert dropped.shape == (60, 64)
    # Four standard deviations of the mean of 3840 draws.
    assert dropped.mean() == pytest.approx(0.1, abs=0.0194)
    # Draws that samples or steps shared would make the counts of a step, or of a sample, spread far more.
    for counts, draws in ((dropped.sum(axis=1), 64), (dropped.sum(axis=0), 60)):
        assert 0.4 < counts.var() / (draws * 0.1 * 0.9) < 2.0


def test_drawn_keep_counts_follow_the_truncated_normal():
    loss = HartLossConfig(keep_counts=400)
    counts = [draw_num_kept(0, step, 1024, loss) for step in range(2000)]
    assert min(counts) >= 32 and max(counts) <= 512
    # The half-normal below 1 with deviation 0.25, cut at 0.5: its mean is 0.820.
    assert np.mean(counts) / 1024 == pytest.approx(0.18, abs=0.01)


@given(st.integers(16, 4096), st.integers(1, 6), st.integers(0, 50))
def test_keep_counts_are_buckets(positions, keep_counts, step):
    loss = HartLossConfig(min_kept=8, keep_counts=keep_counts)
    buckets = kept_counts(positions, loss)
    assert len(buckets) <= keep_counts and list(buckets) == sorted(buckets)
    assert draw_num_kept(3, step, positions, loss) in buckets


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"drop_mean": 0.0, "drop_std": 0.0}, 100),
        ({"drop_mean": 0.6, "drop_std": 0.0}, 40),
        ({"drop_mean": 1.0, "drop_std": 0.0, "drop_min": 1.0}, 8),
    ],
)
def test_without_a_deviation_every_step_keeps_as_many(settings, kept):
    loss = HartLossConfig(min_kept=8, **settings)
    assert kept_counts(100, loss) == (kept,)
    assert bucket_probabilities(100, loss) == {kept: 1.0}
    assert {draw_num_kept(0, step, 100, loss) for step in range(9)} == {kept}


@given(st.floats(0, 1), st.floats(0, 3), st.floats(0, 1), st.integers(1, 64))
def test_whatever_the_settings_allow_is_drawn(mean, deviation, least, positions):
    try:
        loss = HartLossConfig(drop_mean=mean, drop_std=deviation, drop_min=least)
    except UserError:
        return
    assert draw_num_kept(0, 1, positions, loss) in kept_counts(positions, loss)
    assert sum(bucket_probabilities(positions, loss).values()) == pytest.approx(1)


@pytest.mark.parametrize("positions", [40, 1024])
def test_bucket_probabilities_are_those_of_the_draws(positions):
    loss = HartLossConfig(keep_counts=3)
    expected = bucket_probabilities(positions, loss)
    draws = [draw_num_kept(1, step, positions, loss) for step in range(4000)]
    assert sum(expected.values()) == pytest.approx(1)
    assert {bucket: draws.count(bucket) / 4000 for bucket in expected} == pytest.approx(expected, abs=0.03)


def test_kept_tokens_are_distinct_ascending_and_differ_between_samples():
    kept = np.asarray(draw_kept_tokens(jax.random.key(0), 8, 16, 6))
    assert (np.diff(kept, axis=1) > 0).all() and kept.min() >= 0 and kept.max() < 16
    assert len({tuple(row) for row in kept}) > 1
