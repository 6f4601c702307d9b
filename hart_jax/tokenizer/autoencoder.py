"""Encoder and decoder of the tokenizer: the VQGAN layout (SPEC.md section 1). Images are (B, H, W, 3) in [-1, 1]."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from hart_jax.config import TokenizerConfig

CONV_INIT = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, None, "conv_in", "conv_out"))
CONV_BIAS_INIT = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))


def conv(features: int, kernel: int = 3, *, stride: int = 1, padding="SAME", name: str, dtype=None) -> nn.Conv:
    """A square convolution whose kernel axes are named for sharding."""
    size = kernel, kernel
    return nn.Conv(
        features, size, stride, padding, name=name, dtype=dtype, kernel_init=CONV_INIT, bias_init=CONV_BIAS_INIT
    )


def norm(name: str, dtype=None) -> nn.GroupNorm:
    ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
    return nn.GroupNorm(32, epsilon=1e-6, scale_init=ones, bias_init=zeros, name=name, dtype=dtype)


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus a 1x1 shortcut where the width changes."""

    features: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h = conv(self.features, name="conv1", dtype=self.dtype)(nn.silu(norm("norm1", self.dtype)(x_BHWC)))
        h = conv(self.features, name="conv2", dtype=self.dtype)(nn.silu(norm("norm2", self.dtype)(h)))
        if x_BHWC.shape[-1] != self.features:
            x_BHWC = conv(self.features, 1, name="nin_shortcut", dtype=self.dtype)(x_BHWC)
        return nn.with_logical_constraint(x_BHWC + h, ("batch", None, None, None))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, scaled by 1/sqrt(channels)."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        batch, height, width, channels = x_BHWC.shape
        qkv = conv(3 * channels, 1, name="qkv", dtype=self.dtype)(norm("norm", self.dtype)(x_BHWC))
        q, k, v = jnp.split(qkv.reshape(batch, height * width, 3 * channels), 3, axis=-1)
        logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * channels**-0.5
        out = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(logits).astype(v.dtype), v)
        out = out.reshape(batch, height, width, channels)
        return x_BHWC + conv(channels, 1, name="proj_out", dtype=self.dtype)(out)


class Upsample(nn.Module):
    """Nearest-neighbour to twice the side, then a 3x3 convolution, at 4/9 of its products.

    The four pixels that a pixel becomes are equal, so that each of the results sees 2x2 different ones: it is a 2x2
    convolution before the upsampling, with the sums of those weights that meet equal pixels.
    """

    features: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        batch, height, width, inputs = x_BHWC.shape
        kernel = self.param("kernel", CONV_INIT, (3, 3, inputs, self.features))
        bias = self.param("bias", CONV_BIAS_INIT, (self.features,))
        x = x_BHWC.astype(self.dtype or jnp.float32)

        def sums(kernel: jax.Array, axis: int, after: int) -> jax.Array:
            """The two weights along an axis that the pixel before or after its middle has."""
            first, middle, last = jnp.split(kernel, 3, axis)
            pair = (first + middle, last) if after else (first, middle + last)
            return jnp.concatenate(pair, axis)

        def quarter(down: int, right: int) -> jax.Array:
            padding = [(1 - down, down), (1 - right, right)]
            weights = sums(sums(kernel, 0, down), 1, right).astype(x.dtype)
            return jax.lax.conv_general_dilated(x, weights, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

        rows = [jnp.stack([quarter(down, right) for right in range(2)], axis=3) for down in range(2)]
        return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, self.features) + bias.astype(x.dtype)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    features: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x = ResBlock(self.features, self.dtype, name="block_1")(x_BHWC)
        x = AttnBlock(self.dtype, name="attn_1")(x)
        return ResBlock(self.features, self.dtype, name="block_2")(x)


class Encoder(nn.Module):
    """(B, H, W, 3) in [-1, 1] -> (B, h, w, C) before `quant_conv`."""

    config: TokenizerConfig
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        cfg, last = self.config, len(self.config.channel_multipliers) - 1
        x = conv(cfg.channels, name="conv_in", dtype=self.dtype)(image_BHWC)
        for level, multiplier in enumerate(cfg.channel_multipliers):
            for index in range(cfg.res_blocks):
                x = ResBlock(cfg.channels * multiplier, self.dtype, name=f"down_{level}_block_{index}")(x)
                if level == last:
                    x = AttnBlock(self.dtype, name=f"down_{level}_attn_{index}")(x)
            if level != last:
                # Only right and bottom are padded, as in VQGAN.
                right_bottom: Sequence[tuple[int, int]] = ((0, 1), (0, 1))
                down = conv(
                    x.shape[-1], stride=2, padding=right_bottom, name=f"down_{level}_downsample", dtype=self.dtype
                )
                x = down(x)
        x = Middle(x.shape[-1], self.dtype, name="mid")(x)
        return conv(cfg.latent_channels, name="conv_out", dtype=self.dtype)(nn.silu(norm("norm_out", self.dtype)(x)))


class Decoder(nn.Module):
    """(B, h, w, C) after `post_quant_conv` -> (B, H, W, 3), not clipped."""

    config: TokenizerConfig
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, latent_BhwC: jax.Array) -> jax.Array:
        cfg, last = self.config, len(self.config.channel_multipliers) - 1
        x = conv(cfg.channels * cfg.channel_multipliers[-1], name="conv_in", dtype=self.dtype)(latent_BhwC)
        x = Middle(x.shape[-1], self.dtype, name="mid")(x)
        for level in reversed(range(last + 1)):
            for index in range(cfg.res_blocks + 1):
                features = cfg.channels * cfg.channel_multipliers[level]
                x = ResBlock(features, self.dtype, name=f"up_{level}_block_{index}")(x)
                if level == last:
                    x = AttnBlock(self.dtype, name=f"up_{level}_attn_{index}")(x)
            if level:
                x = Upsample(x.shape[-1], self.dtype, name=f"up_{level}_upsample")(x)
        return conv(3, name="conv_out", dtype=self.dtype)(nn.silu(norm("norm_out", self.dtype)(x)))
