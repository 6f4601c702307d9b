"""Encoder, decoder and the whole tokenizer: shapes, padding, logical names, precision."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.config import TokenizerConfig
from hart_jax.tokenizer.autoencoder import AttnBlock, Encoder, Upsample, conv
from hart_jax.tokenizer.model import Tokenizer

CONFIG = TokenizerConfig(
    image_size=8,
    patch_nums=(1, 2, 3, 4),
    channels=32,
    channel_multipliers=(1, 2),
    res_blocks=1,
    latent_channels=4,
    vocab_size=16,
)
SHAPE = (2, 8, 8, 3)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.uniform(jax.random.key(0), SHAPE, minval=-1.0, maxval=1.0)


@pytest.fixture(scope="module")
def params(images) -> dict:
    init = jax.jit(lambda key: nn.unbox(Tokenizer(CONFIG).init(key, images)["params"]))
    return init(jax.random.key(1))


@functools.partial(jax.jit, static_argnames=("method", "dtype", "continuous"))
def apply(params, argument, method, dtype=None, **settings):
    return Tokenizer(CONFIG, dtype).apply({"params": params}, argument, method=method, **settings)


def test_shapes(params, images):
    latent = apply(params, images, "encode")
    assert latent.shape == (2, 4, 4, 4) and latent.dtype == jnp.float32
    assert apply(params, latent, "decode").shape == SHAPE
    tokens = apply(params, images, "tokens")
    assert [index.shape for index in tokens.indices] == [(2, 1), (2, 4), (2, 9), (2, 16)]


def test_released_layout_is_sixteenfold():
    config = TokenizerConfig()
    image = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    variables = jax.eval_shape(Tokenizer(config).init, jax.random.key(0), image)
    latent = jax.eval_shape(functools.partial(Tokenizer(config).apply, method="encode"), variables, image)
    assert latent.shape == (1, 16, 16, 32)
    assert set(variables["params"]["encoder"]) >= {"down_4_block_1", "down_4_attn_1", "down_3_downsample", "mid"}
    assert "down_4_downsample" not in variables["params"]["encoder"]
    assert set(variables["params"]["decoder"]) >= {"up_4_block_2", "up_4_attn_2", "up_1_upsample"}
    assert "up_0_upsample" not in variables["params"]["decoder"]


def test_every_parameter_names_its_axes():
    image = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    variables = jax.eval_shape(Tokenizer(CONFIG).init, jax.random.key(0), image)
    boxes = jax.tree.leaves(variables["params"], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
    specs = jax.tree.leaves(nn.get_partition_spec(variables["params"]), is_leaf=lambda x: isinstance(x, jax.P))
    for box, spec in zip(boxes, specs, strict=True):
        assert len(spec) == box.value.ndim
        assert any(spec)


def test_downsampling_pads_right_and_bottom_only():
    """A mean over the window of a map of ones is smaller only where the window reaches into padding."""
    ones = jnp.ones((1, 8, 8, 3))
    shapes = jax.eval_shape(Encoder(CONFIG).init, jax.random.key(0), ones)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), nn.unbox(shapes["params"]))
    params["conv_in"]["bias"] += 1.0
    params["down_0_downsample"]["kernel"] += 1.0 / (9 * 32)

    @jax.jit
    def downsampled(params):
        def wanted(module, _):
            return module.name == "down_0_downsample"

        _, seen = Encoder(CONFIG).apply({"params": params}, ones, capture_intermediates=wanted)
        return seen["intermediates"]["down_0_downsample"]["__call__"][0]

    expected = np.outer([1, 1, 1, 2 / 3], [1, 1, 1, 2 / 3])
    np.testing.assert_allclose(downsampled(params)[0, :, :, 0], expected, atol=1e-5)


def test_upsampling_is_nearest_neighbour_and_a_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    params = nn.unbox(Upsample(6).init(jax.random.key(1), x))
    params["params"]["bias"] = jnp.arange(6.0)
    repeated = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    expected = conv(6, name="conv").apply(params, repeated)
    np.testing.assert_allclose(Upsample(6).apply(params, x), expected, atol=1e-5)


def test_attention_is_over_all_positions_scaled_by_width():
    x = jax.random.normal(jax.random.key(0), (1, 3, 3, 32))
    variables = nn.unbox(jax.jit(AttnBlock().init)(jax.random.key(1), x))
    params = variables["params"]
    normed = nn.GroupNorm(32, epsilon=1e-6).apply({"params": params["norm"]}, x).reshape(9, 32)
    q, k, v = np.split(normed @ params["qkv"]["kernel"][0, 0] + params["qkv"]["bias"], 3, axis=1)
    weights = np.exp(q @ k.T / np.sqrt(32))
    out = weights / weights.sum(axis=1, keepdims=True) @ v
    expected = x.reshape(9, 32) + out @ params["proj_out"]["kernel"][0, 0] + params["proj_out"]["bias"]
    np.testing.assert_allclose(AttnBlock().apply(variables, x).reshape(9, 32), expected, atol=1e-5)


def test_reconstruction_is_the_decoded_latent_clipped(params, images):
    conv_out = {**params["decoder"]["conv_out"], "bias": jnp.array([5.0, -5.0, 0.0])}
    params = {**params, "decoder": {**params["decoder"], "conv_out": conv_out}}
    latent = apply(params, images, "encode")
    quantized = apply(params, latent, "quantize")
    for continuous, shown in ((False, quantized.f_hat_BhwC), (True, latent)):
        out = apply(params, images, "reconstruct", continuous=continuous)
        np.testing.assert_allclose(out, np.clip(apply(params, shown, "decode"), -1, 1), atol=1e-4)
        assert out.max() == 1.0 and out.min() == -1.0


def test_bfloat16_computes_narrow_and_returns_wide(params, images):
    narrow = apply(params, images, "encode", dtype=jnp.bfloat16)
    wide = apply(params, images, "encode")
    assert narrow.dtype == jnp.float32
    assert 0 < np.abs(narrow - wide).max() < 0.1 * np.abs(wide).max()
    # The quantizer does not follow: indices of one latent are the same in both.
    for a, b in zip(*(apply(params, wide, "quantize", dtype=d).indices for d in (None, jnp.bfloat16)), strict=True):
        np.testing.assert_array_equal(a, b)
