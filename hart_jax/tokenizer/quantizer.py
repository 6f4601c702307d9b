"""Multi-scale residual quantizer with the continuous residual (SPEC.md section 1)."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.config import TokenizerConfig
from hart_jax.tokenizer.resize import area, bicubic


@flax.struct.dataclass
class Tokens:
    """What the transformer is trained on. `indices` one (B, p*q) int32 per scale, row by row."""

    indices: tuple[jax.Array, ...]
    f_rest_BPC: jax.Array
    ar_input_BLC: jax.Array


@flax.struct.dataclass
class TokenCorruption:
    """How wrong the codes are that the scales build on: `level_B` times as large as what is coded, from `key_B`."""

    level_B: jax.Array
    key_B: jax.Array

    def apply(self, z_BpqC: jax.Array, scale: int) -> jax.Array:
        """What is coded at a scale, with noise that depends on each sample's key alone."""
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, scale), z_BpqC.shape[1:]))(self.key_B)
        size = jnp.sqrt(jnp.mean(z_BpqC**2, axis=(1, 2, 3), keepdims=True))
        return z_BpqC + self.level_B[:, None, None, None] * size * noise


@flax.struct.dataclass
class Quantized:
    """A latent taken apart: f = f_hat + residual.

    `f_hat` (B, h, w, C) is the sum of all scales' contributions, phi at every scale; `partial` holds f_hat after each
    scale, `inputs` what was looked up there, (B*p*q, C); `hits_V` is 1 for the codes that the batch touches.
    """

    f_hat_BhwC: jax.Array
    residual_BhwC: jax.Array
    partial: tuple[jax.Array, ...]
    indices: tuple[jax.Array, ...]
    inputs: tuple[jax.Array, ...]
    hits_V: jax.Array


def phi_index(scale: int, num_scales: int, num_phi: int) -> int:
    """Which phi convolution serves `scale`: the one whose tick is nearest to scale / (S - 1)."""
    third = 3 if num_phi == 4 else 2
    ticks = np.linspace(1 / (third * num_phi), 1 - 1 / (third * num_phi), num_phi)
    return int(np.argmin(np.abs(ticks - scale / (num_scales - 1))))


class Quantizer(nn.Module):
    """The codebook (V, C) and the K phi convolutions, with the passes that use them."""

    config: TokenizerConfig

    def setup(self):
        cfg = self.config
        codebook_init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("codes", "latent"))
        self.codebook = self.param("codebook", codebook_init, (cfg.vocab_size, cfg.latent_channels))
        kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform", in_axis=-2, batch_axis=(0,))
        kernel_init = nn.with_logical_partitioning(kernel_init, ("phi", None, None, "conv_in", "conv_out"))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("phi", "conv_out"))
        shape = (cfg.num_phi, 3, 3, cfg.latent_channels, cfg.latent_channels)
        self.phi_kernel = self.param("phi_kernel", kernel_init, shape)
        self.phi_bias = self.param("phi_bias", bias_init, (cfg.num_phi, cfg.latent_channels))

    def _phi(self, h_BhwC: jax.Array, scale: int) -> jax.Array:
        cfg = self.config
        level = cfg.level_of(scale)
        index = phi_index(level, cfg.num_levels, cfg.num_phi) if cfg.share_quant_resi else level
        kernel, bias = self.phi_kernel[index].astype(h_BhwC.dtype), self.phi_bias[index].astype(h_BhwC.dtype)
        out = jax.lax.conv_general_dilated(
            h_BhwC,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        ratio = abs(cfg.quant_resi)
        return (1 - ratio) * h_BhwC + ratio * (out + bias)

    def nearest(self, z_BpqC: jax.Array) -> jax.Array:
        """Index of the nearest code by squared L2 distance, (B, p*q) int32."""
        z_NC = z_BpqC.reshape(-1, z_BpqC.shape[-1]).astype(jnp.float32)
        codebook = self.codebook.astype(jnp.float32)
        dots = jnp.matmul(z_NC, codebook.T, precision=jax.lax.Precision.HIGHEST)
        distance_NV = jnp.sum(z_NC**2, -1, keepdims=True) + jnp.sum(codebook**2, -1) - 2 * dots
        return jnp.argmin(distance_NV, -1).astype(jnp.int32).reshape(z_BpqC.shape[0], -1)

    def lookup(self, indices_BL: jax.Array) -> jax.Array:
        """Codes of the indices, (B, L, C)."""
        return self.codebook[indices_BL]

    def contribution(self, code_BPC: jax.Array, scale: int) -> jax.Array:
        """phi_s(bicubic(code)): what the codes (B, p*q, C) of one scale add to f_hat (B, h, w, C)."""
        code = code_BPC.reshape(code_BPC.shape[0], *self.config.shapes[scale], -1)
        return self._phi(bicubic(code, self.config.shapes[-1]), scale)

    def decode_indices(self, indices: Sequence[jax.Array], sampled: bool = False) -> jax.Array:
        """f_hat of one index array (B, p*q) per scale, (B, h, w, C).

        phi is applied at every scale, as encoding does; with `sampled` at all but the last, as sampling does.
        """
        parts = [self.contribution(self.lookup(index), scale) for scale, index in enumerate(indices)]
        if sampled:
            parts[-1] = self.lookup(indices[-1]).reshape(parts[-1].shape)
        return functools.reduce(jnp.add, parts)

    def quantize(self, f_BhwC: jax.Array) -> Quantized:
        """Takes a latent apart; no gradient is stopped, none flows through the indices."""
        residual, f_hat = f_BhwC, jnp.zeros_like(f_BhwC)
        partial, indices, inputs = [], [], []
        hits_V = jnp.zeros(self.config.vocab_size, jnp.float32)
        for scale, shape in enumerate(self.config.shapes):
            z = area(residual, shape)
            index = self.nearest(z)
            h = self.contribution(self.lookup(index), scale)
            f_hat, residual = f_hat + h, residual - h
            hits_V = hits_V.at[index.reshape(-1)].set(1.0)
            partial.append(f_hat)
            indices.append(index)
            inputs.append(z.reshape(-1, z.shape[-1]))
        return Quantized(f_hat, residual, tuple(partial), tuple(indices), tuple(inputs), hits_V)

    def tokens(self, f_BhwC: jax.Array, corruption: TokenCorruption | None = None) -> Tokens:
        """Targets of the transformer: the last scale's code is never subtracted, so phi is not applied there.

        With `corruption`, the scales build on codes that are wrong by so much, and the targets are still the best ones
        there: what is left to add to the image, wrong codes included.
        """
        residual, f_hat = f_BhwC, jnp.zeros_like(f_BhwC)
        indices, inputs = [], []
        shapes = self.config.shapes
        for scale, shape in enumerate(shapes):
            z = area(residual, shape)
            indices.append(self.nearest(z))
            if scale == len(shapes) - 1:
                break
            chosen = self.nearest(corruption.apply(z, scale)) if corruption else indices[-1]
            h = self.contribution(self.lookup(chosen), scale)
            f_hat, residual = f_hat + h, residual - h
            following = area(f_hat, shapes[scale + 1])
            inputs.append(following.reshape(following.shape[0], -1, following.shape[-1]))
        rest = residual.reshape(residual.shape[0], -1, residual.shape[-1])
        return Tokens(tuple(indices), rest, jnp.concatenate(inputs, axis=1))

    def latent(self, tokens: Tokens) -> jax.Array:
        """The latent (B, h, w, C) that `tokens`, made without corruption, are of."""
        rest = tokens.f_rest_BPC
        rest = rest.reshape(rest.shape[0], *self.config.shapes[-1], -1)
        return rest + self.decode_indices(tokens.indices[:-1])

    def corrupt(self, tokens: Tokens, corruption: TokenCorruption) -> Tokens:
        """The tokens of the same images, some codes on the way chosen wrongly."""
        return self.tokens(self.latent(tokens), corruption)
