"""A tokenizer training step: it learns, decodes both kinds of latents, restarts dead codes, and trains the
discriminator when due."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.config import OptimizerConfig, TokenizerConfig, TokenizerLossConfig
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.training.state import make_optimizer
from hart_jax.training.tokenizer_step import (
    init_tokenizer_state,
    make_tokenizer_step,
    restart_unused_codes,
    tokenizer_state,
)

CONFIG = TokenizerConfig(
    image_size=24,
    patch_nums=(1, 4, 12),
    channels=32,
    channel_multipliers=(1, 1),
    res_blocks=1,
    latent_channels=4,
    vocab_size=16,
)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=2e-3, warmup_steps=2), 100)
KEY = jax.random.key(0)
TOKENIZER = Tokenizer(CONFIG)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth images: a corner of each is bright."""
    ramp = np.linspace(0, 255, 24)
    image = np.minimum.outer(ramp, ramp)
    return np.stack([image, image[::-1], image[:, ::-1], image.T / 2])[..., None].repeat(3, -1).astype(np.uint8)


@pytest.fixture(scope="module")
def initial(images):
    return jax.device_get(jax.jit(lambda: init_tokenizer_state(KEY, TOKENIZER, OPTIMIZER, jnp.asarray(images)))())


@pytest.fixture
def state(initial):
    """A state that may be donated."""
    return jax.tree.map(jnp.array, initial)


@functools.cache
def step_with(accumulate=1, **loss):
    return make_tokenizer_step(TOKENIZER, OPTIMIZER, TokenizerLossConfig(**loss), ema_decay=0.9, accumulate=accumulate)


def differs(a, b) -> bool:
    return any(np.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_initial_state(initial):
    assert not differs(initial.model.params, initial.model.ema)
    assert int(initial.step) == 0
    np.testing.assert_array_equal(initial.code_usage_V, np.ones(16))


@pytest.mark.slow
def test_learns_one_batch_and_leaves_the_discriminator_alone(state, initial, images):
    step = step_with(continuous_fraction=0.0)
    losses, used = [], []
    for _ in range(20):
        state, metrics = step(state, images, KEY, None, adversarial=False)
        losses.append(float(metrics["mse"]))
        used.append(float(metrics["codes_used"]))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])
    # The codebook starts among the latents: several codes serve from the first step on.
    assert used[0] >= 4 / 16
    assert int(state.step) == 20
    assert "discriminator" not in metrics and "generator" not in metrics
    assert differs(state.model.params, initial.model.params) and differs(state.model.ema, initial.model.ema)
    assert not differs((state.disc, state.disc_stats), (initial.disc, initial.disc_stats))
    # Without restarts the codes' usage is not followed.
    np.testing.assert_array_equal(state.code_usage_V, initial.code_usage_V)


def test_same_state_batch_and_key_give_the_same_bits(initial, images):
    step = step_with(continuous_fraction=0.0)
    runs = [step(jax.tree.map(jnp.array, initial), images, KEY, None, adversarial=False) for _ in range(2)]
    assert not differs(*runs)


@pytest.mark.parametrize("fraction", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_what_is_decoded(state, initial, images, fraction):
    _, metrics = step_with(continuous_fraction=fraction)(state, images, KEY, None, adversarial=False)
    drawn, other = ("continuous", "discrete") if fraction else ("discrete", "continuous")
    np.testing.assert_allclose(metrics[f"mse_{drawn}"], metrics["mse"], rtol=1e-6)
    assert metrics[f"mse_{other}"] == 0.0
    params = {"params": jax.tree.map(jnp.asarray, initial.model.params)}
    scaled = jnp.asarray(images, jnp.float32) / 127.5 - 1.0

    @jax.jit
    def decoded(params):
        latent = TOKENIZER.apply(params, scaled, method="encode")
        latent = latent if fraction else TOKENIZER.apply(params, latent, method="quantize").f_hat_BhwC
        return TOKENIZER.apply(params, latent, method="decode")

    np.testing.assert_allclose(metrics["mse"], np.mean((decoded(params) - scaled) ** 2), rtol=1e-4)


def adversarial_step():
    """In two parts, with codes that restart."""
    return step_with(2, adversarial=0.1, restart_below=0.99)


@pytest.mark.slow
def test_adversarial_step_trains_the_discriminator(state, initial, images):
    for _ in range(2):
        state, metrics = adversarial_step()(state, images, KEY, None, adversarial=True)
    assert differs(state.disc.params, initial.disc.params)
    assert differs(state.disc_stats, initial.disc_stats)
    assert int(state.disc.step) == 2 and float(metrics["skipped_steps"]) == 0
    assert 0 < metrics["discriminator"] < 3 and np.isfinite(metrics["generator"])


def test_dead_codes_become_latents_of_the_batch(state, images):
    scaled = jnp.asarray(images, jnp.float32) / 127.5 - 1.0

    @jax.jit
    def restarted(state):
        latent = TOKENIZER.apply({"params": state.model.params}, scaled, method="encode")
        quantized = TOKENIZER.apply({"params": state.model.params}, latent, method="quantize")
        return quantized, restart_unused_codes(
            KEY, state, jnp.concatenate(quantized.inputs), quantized.hits_V, below=0.03
        )

    # Code 3 was hardly hit lately, and is out of reach now.
    codebook = state.model.params["quantizer"]["codebook"].at[3].set(1e3)
    params = {**state.model.params, "quantizer": {**state.model.params["quantizer"], "codebook": codebook}}
    usage = jnp.full(16, 0.5).at[3].set(0.001)
    before = state.replace(model=state.model.replace(params=params), code_usage_V=usage)
    quantized, after = restarted(before)
    latents = np.concatenate(quantized.inputs)
    new = after.model.params["quantizer"]["codebook"]
    assert any(np.allclose(new[3], latent) for latent in latents)
    np.testing.assert_array_equal(new[3], after.model.ema["quantizer"]["codebook"][3])
    kept = np.arange(16) != 3
    np.testing.assert_array_equal(new[kept], codebook[kept])
    np.testing.assert_array_equal(
        after.model.ema["quantizer"]["codebook"][kept], before.model.ema["quantizer"]["codebook"][kept]
    )
    expected = 0.99 * 0.5 + 0.01 * np.asarray(quantized.hits_V)
    np.testing.assert_allclose(after.code_usage_V[kept], expected[kept], rtol=1e-6)
    assert after.code_usage_V[3] == 1.0


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(initial, images):
    disc = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), initial.disc.params)
    state = jax.tree.map(jnp.array, initial.replace(disc=initial.disc.replace(params=disc)))
    before = jax.device_get(state)
    after, metrics = adversarial_step()(state, images, KEY, None, adversarial=True)
    assert float(metrics["skipped_steps"]) == 1
    assert (int(after.step), int(after.disc.step)) == (1, 1)
    same = after.replace(
        model=after.model.replace(step=before.model.step), disc=after.disc.replace(step=before.disc.step)
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(same), before)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [4])
def test_a_batch_in_parts_trains_as_the_whole_one_does(initial, images, accumulate):
    ends = []
    for parts in (1, accumulate):
        # Some codes are dead, and restart.
        step, state = step_with(parts, restart_below=0.989), jax.tree.map(jnp.array, initial)
        history = []
        for _ in range(3):
            state, metrics = step(state, images, KEY, None, adversarial=False)
            history.append(jax.device_get(metrics))
        ends.append((history, jax.device_get(state)))
    (parts_history, parts_state), (history, state) = ends
    # Adam divides a gradient by its own size: what the sums round otherwise grows about tenfold from step to step.
    for rtol, ours, theirs in zip((1e-6, 1e-5, 1e-4), parts_history, history, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=1e-7, err_msg=name)
    np.testing.assert_array_equal(parts_state.code_usage_V, state.code_usage_V)
    codebooks = [end.model.params["quantizer"]["codebook"] for end in (parts_state, state, initial)]
    np.testing.assert_allclose(codebooks[0], codebooks[1], atol=1e-5)
    assert np.any(np.abs(codebooks[1] - codebooks[2]) > 0.1)


FROZEN = ("encoder", "quant_conv", "quantizer")


def test_frozen_parts_stay_to_the_last_bit(initial, images):
    trained = jax.tree.map(jnp.array, initial.model.params)
    # Adding nothing to it would change its bits.
    trained["encoder"]["conv_in"]["bias"] = trained["encoder"]["conv_in"]["bias"].at[0].set(-0.0)
    before = jax.device_get(trained)
    state = tokenizer_state(KEY, trained, OPTIMIZER, (24, 24), FROZEN)
    for _ in range(3):
        state, metrics = step_with(vq=1.0)(state, images, KEY, None, adversarial=False)
    after = jax.device_get(state)
    assert set(after.frozen) == set(FROZEN)
    for params in (after.frozen, after.ema):
        frozen = {name: params[name] for name in FROZEN}
        bits = [[leaf.view(np.int32) for leaf in jax.tree.leaves(tree)] for tree in (frozen, after.frozen)]
        expected = [leaf.view(np.int32) for leaf in jax.tree.leaves({name: before[name] for name in FROZEN})]
        for leaves in bits:
            jax.tree.map(np.testing.assert_array_equal, leaves, expected)
    for name in ("decoder", "post_quant_conv"):
        assert differs(after.model.params[name], before[name]) and differs(after.ema[name], before[name])
    # Adam's moments and the average are of the decoder alone.
    trainable = sum(leaf.size for leaf in jax.tree.leaves([before["decoder"], before["post_quant_conv"]]))
    moments = [leaf.size for leaf in jax.tree.leaves(after.model.opt_state) if leaf.ndim]
    assert sum(moments) == 2 * trainable
    assert sum(leaf.size for leaf in jax.tree.leaves(after.model.ema)) == trainable
    assert float(metrics["update_norm"]) > 0
