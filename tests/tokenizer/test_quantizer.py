"""The quantizer: what it takes apart adds up again, codes are nearest, and targets follow SPEC.md section 1."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.config import TokenizerConfig
from hart_jax.tokenizer.losses import straight_through, vq_loss
from hart_jax.tokenizer.quantizer import Quantizer, TokenCorruption, phi_index
from hart_jax.tokenizer.resize import area, bicubic

CONFIG = TokenizerConfig(
    image_size=16,
    patch_nums=(1, 2, 3, 5, 8),
    channels=32,
    channel_multipliers=(1, 1),
    res_blocks=1,
    latent_channels=4,
    vocab_size=24,
)
BATCH = 2


@pytest.fixture(scope="module")
def latent() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (BATCH, 8, 8, 4))


@pytest.fixture(scope="module")
def variables(latent) -> dict:
    params = init(latent)
    # Not zero, so that a forgotten bias shows.
    return {"params": {**params, "phi_bias": jax.random.normal(jax.random.key(2), params["phi_bias"].shape)}}


@functools.partial(jax.jit, static_argnames=("method", "scale", "config"))
def apply(variables, method, argument, scale=None, config=CONFIG):
    arguments = (argument,) if scale is None else (argument, scale)
    return Quantizer(config).apply(variables, *arguments, method=method)


@jax.jit
def corrupt(variables, tokens, corruption):
    return Quantizer(CONFIG).apply(variables, tokens, corruption, method="corrupt")


@functools.partial(jax.jit, static_argnames="config")
def init(latent, config=CONFIG):
    return nn.unbox(Quantizer(config).init(jax.random.key(0), latent, method="quantize")["params"])


def test_parts_add_up(variables, latent):
    quantized = apply(variables, "quantize", latent)
    np.testing.assert_allclose(quantized.f_hat_BhwC + quantized.residual_BhwC, latent, atol=1e-5)
    assert np.abs(quantized.residual_BhwC).max() > 0.1
    np.testing.assert_array_equal(quantized.partial[-1], quantized.f_hat_BhwC)


def test_codes_are_nearest(variables, latent):
    quantized = apply(variables, "quantize", latent)
    codebook = np.asarray(variables["params"]["codebook"], np.float64)
    for side, index, z in zip(CONFIG.patch_nums, quantized.indices, quantized.inputs, strict=True):
        assert index.shape == (BATCH, side * side) and index.dtype == jnp.int32
        distance = np.sum((np.asarray(z, np.float64)[:, None] - codebook) ** 2, axis=-1)
        np.testing.assert_array_equal(index.reshape(-1), distance.argmin(axis=1))


def test_inputs_are_the_pooled_rest_of_each_scale(variables, latent):
    quantized = apply(variables, "quantize", latent)
    before = [jnp.zeros_like(latent), *quantized.partial[:-1]]
    for side, f_hat, z in zip(CONFIG.patch_nums, before, quantized.inputs, strict=True):
        np.testing.assert_allclose(z.reshape(BATCH, side, side, -1), area(latent - f_hat, (side, side)), atol=1e-5)


def test_indices_decode_to_f_hat(variables, latent):
    quantized = apply(variables, "quantize", latent)
    f_hat = apply(variables, "decode_indices", quantized.indices)
    np.testing.assert_allclose(f_hat, quantized.f_hat_BhwC, atol=1e-5)


def test_a_code_that_is_hit_is_counted(variables, latent):
    quantized = apply(variables, "quantize", latent)
    hit = np.unique(np.concatenate([np.ravel(index) for index in quantized.indices]))
    np.testing.assert_array_equal(np.flatnonzero(quantized.hits_V), hit)
    assert set(np.unique(quantized.hits_V)) == {0.0, 1.0}


def test_contribution_is_a_blend_with_the_convolution(variables):
    code = jax.random.normal(jax.random.key(3), (BATCH, 4, 4))
    h = np.asarray(bicubic(code.reshape(BATCH, 2, 2, 4), (8, 8)))
    kernel, bias = variables["params"]["phi_kernel"][1], variables["params"]["phi_bias"][1]
    padded = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
    convolved = sum(padded[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3)) + bias
    assert phi_index(1, 5, 4) == 1
    np.testing.assert_allclose(apply(variables, "contribution", code, 1), 0.5 * h + 0.5 * convolved, atol=1e-5)


def test_targets_leave_the_last_code_in_the_residual(variables, latent):
    quantized, tokens = apply(variables, "quantize", latent), apply(variables, "tokens", latent)
    for index, same in zip(tokens.indices, quantized.indices, strict=True):
        np.testing.assert_array_equal(index, same)
    before_last = quantized.partial[-2]
    np.testing.assert_allclose(tokens.f_rest_BPC, (latent - before_last).reshape(BATCH, 64, 4), atol=1e-5)
    # Code and residual beside it give the latent again, without phi at the last scale.
    code = apply(variables, "lookup", tokens.indices[-1])
    whole = before_last.reshape(BATCH, 64, 4) + code + (tokens.f_rest_BPC - code)
    np.testing.assert_allclose(whole, latent.reshape(BATCH, 64, 4), atol=1e-5)


@pytest.mark.parametrize("kept_as", [np.float32, np.float16])
def test_tokens_of_one_list_give_those_of_another(variables, latent, kept_as):
    """The latent of tokens, `f_rest` kept in this type, is quantised anew as the image's is."""
    other = CONFIG.of_list((1, 3, 8))
    exact = apply(variables, "tokens", latent, config=other)
    tokens = apply(variables, "tokens", latent)
    tokens = tokens.replace(f_rest_BPC=np.asarray(tokens.f_rest_BPC, kept_as).astype(np.float32))
    again = apply(variables, "latent", tokens)
    bound = 4 * float(jnp.max(jnp.abs(tokens.f_rest_BPC))) * float(np.finfo(kept_as).eps)
    np.testing.assert_allclose(again, latent, atol=bound)
    found = apply(variables, "tokens", again, config=other)
    for ours, theirs in zip(found.indices, exact.indices, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(found.f_rest_BPC, exact.f_rest_BPC, atol=2 * bound)
    np.testing.assert_allclose(found.ar_input_BLC, exact.ar_input_BLC, atol=2 * bound)


def test_inputs_of_the_transformer(variables, latent):
    quantized, tokens = apply(variables, "quantize", latent), apply(variables, "tokens", latent)
    assert tokens.ar_input_BLC.shape == (BATCH, sum(p * p for p in CONFIG.patch_nums[1:]), 4)
    start = 0
    for side, f_hat in zip(CONFIG.patch_nums[1:], quantized.partial, strict=False):
        part = tokens.ar_input_BLC[:, start : start + side * side]
        np.testing.assert_allclose(part.reshape(BATCH, side, side, 4), area(f_hat, (side, side)), atol=1e-5)
        start += side * side


def test_the_latent_comes_back_from_its_tokens(variables, latent):
    tokens = apply(variables, "tokens", latent)
    np.testing.assert_allclose(apply(variables, "latent", tokens), latent, atol=1e-5)


def test_corruption_is_left_for_later_scales_to_correct(variables, latent):
    right = apply(variables, "tokens", latent)
    keys = jax.random.split(jax.random.key(7), BATCH)
    none = corrupt(variables, right, TokenCorruption(jnp.zeros(BATCH), keys))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5), none, right)

    level = jnp.ones(BATCH)
    wrong = corrupt(variables, right, TokenCorruption(level, keys))
    np.testing.assert_array_equal(wrong.indices[0], right.indices[0])
    assert np.mean(wrong.indices[-1] != right.indices[-1]) > 0.1
    # What was added and what is left are still the latent.
    side = CONFIG.patch_nums[-1]
    before_last = wrong.ar_input_BLC[:, -side * side :]
    np.testing.assert_allclose(before_last + wrong.f_rest_BPC, latent.reshape(BATCH, -1, 4), atol=1e-5)

    first = jax.tree.map(lambda leaf: leaf[:1], right)
    alone = corrupt(variables, first, TokenCorruption(level[:1], keys[:1]))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs[:1], atol=1e-5), alone, wrong)


@pytest.mark.parametrize(
    ("num_phi", "expected"),
    # Scales 2 and 7 lie midway between two of four ticks: what rounding gives there is what the release computes.
    [(4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]), (2, [0] * 5 + [1] * 5), (1, [0] * 10)],
)
def test_phi_of_a_scale(num_phi, expected):
    assert [phi_index(scale, 10, num_phi) for scale in range(10)] == expected


@pytest.mark.parametrize("share", [0, 1, 2])
def test_other_numbers_of_phi(share, latent):
    config = dataclasses.replace(CONFIG, share_quant_resi=share)
    params = init(latent, config)
    used = share or len(config.patch_nums)
    assert params["phi_kernel"].shape == (used, 3, 3, 4, 4)
    # With zero kernels, the bias alone tells which phi served a scale.
    params = {**params, "phi_kernel": jnp.zeros_like(params["phi_kernel"])}
    params["phi_bias"] = jnp.arange(used)[:, None] * jnp.ones(4)
    served = []
    for scale, side in enumerate(config.patch_nums):
        added = apply({"params": params}, "contribution", jnp.zeros((1, side * side, 4)), scale, config=config)
        assert np.ptp(added) == 0
        served.append(int(added[0, 0, 0, 0] / 0.5))
    assert served == {0: [0, 1, 2, 3, 4], 1: [0] * 5, 2: [0, 0, 0, 1, 1]}[share]


@pytest.mark.parametrize("quant_resi", [0.0, -0.5, 1.0])
def test_share_of_phi(quant_resi, variables, latent):
    h = apply(variables, "contribution", jnp.ones((1, 64, 4)), 4, config=dataclasses.replace(CONFIG, quant_resi=0.0))
    np.testing.assert_allclose(h, np.ones((1, 8, 8, 4)), atol=1e-6)
    phi = 2 * apply(variables, "contribution", jnp.ones((1, 64, 4)), 4) - h
    config = dataclasses.replace(CONFIG, quant_resi=quant_resi)
    blend = apply(variables, "contribution", jnp.ones((1, 64, 4)), 4, config=config)
    ratio = abs(quant_resi)
    np.testing.assert_allclose(blend, (1 - ratio) * h + ratio * phi, atol=1e-5)


def test_vq_loss(variables, latent):
    quantized = apply(variables, "quantize", latent)
    errors = [np.mean((np.asarray(f_hat) - np.asarray(latent)) ** 2) for f_hat in quantized.partial]
    np.testing.assert_allclose(vq_loss(quantized, latent, 0.25), 1.25 * np.mean(errors), rtol=1e-5)


def test_vq_loss_moves_the_latent_by_beta_only(variables, latent):
    def loss(f, beta):
        return vq_loss(apply(variables, "quantize", f), f, beta)

    # The codes are fixed here: the latent's own gradient is what beta scales.
    without = jax.grad(lambda f: loss(f, 0.0))(latent)
    quantized = apply(variables, "quantize", latent)
    expected = np.mean([latent - f_hat for f_hat in quantized.partial], axis=0) * 2 / latent.size
    np.testing.assert_allclose(without, np.zeros_like(latent), atol=1e-7)
    np.testing.assert_allclose(jax.grad(lambda f: loss(f, 0.25))(latent), 0.25 * expected, atol=1e-6)


def test_vq_loss_moves_only_codes_that_were_hit(variables, latent):
    def loss(params):
        return vq_loss(apply({"params": params}, "quantize", latent), latent, 0.25)

    gradient = jax.grad(loss)(variables["params"])["codebook"]
    hits = apply(variables, "quantize", latent).hits_V
    assert 0 < np.sum(hits) <= 24
    np.testing.assert_array_equal(np.abs(gradient).max(axis=1) > 0, np.asarray(hits) > 0)


def test_straight_through(variables, latent):
    f_hat = apply(variables, "quantize", latent).f_hat_BhwC
    np.testing.assert_allclose(straight_through(latent, f_hat), f_hat, atol=1e-6)
    weights = jax.random.normal(jax.random.key(5), latent.shape)
    to_latent, to_f_hat = jax.grad(lambda f, g: jnp.sum(straight_through(f, g) * weights), argnums=(0, 1))(
        latent, f_hat
    )
    np.testing.assert_allclose(to_latent, weights)
    np.testing.assert_array_equal(to_f_hat, jnp.zeros_like(f_hat))
