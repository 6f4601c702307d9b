"""The network of the residual diffusion head: a per-token MLP with adaptive norms (SPEC.md section 4; MAR)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hart_jax.config import DiffusionConfig
from hart_jax.layers import TimestepEmbed, dense, split_rows

ZEROS = nn.initializers.zeros
XAVIER = nn.initializers.xavier_uniform()


def _layer_norm(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.mean((x - mean) ** 2, -1, keepdims=True) + 1e-6)


class ResBlock(nn.Module):
    """x += gate * MLP(LN(x) * (1 + scale) + shift); a scan body with carry x."""

    width: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_NW: jax.Array, y_NW: jax.Array):
        modulation = dense(3 * self.width, (None, "diffusion"), init=ZEROS, dtype=self.dtype, name="ada_lin")
        shift, scale, gate = jnp.split(split_rows(modulation(nn.silu(y_NW))), 3, axis=-1)
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("diffusion",))
        zeros = nn.with_logical_partitioning(ZEROS, ("diffusion",))
        h = _layer_norm(x_NW) * self.param("norm_scale", ones, (self.width,))
        h = (h + self.param("norm_bias", zeros, (self.width,))).astype(x_NW.dtype)
        h = h * (1 + scale) + shift
        h = dense(self.width, ("diffusion", None), init=XAVIER, dtype=self.dtype, name="linear_1")(split_rows(h))
        h = dense(self.width, (None, "diffusion"), init=XAVIER, dtype=self.dtype, name="linear_2")(
            nn.silu(split_rows(h))
        )
        return split_rows(x_NW + gate * h), None


class DiffusionHead(nn.Module):
    """(x_t (N, C), t (N,) in 0..999, z (N, W)) -> (N, 2C) float32: the noise, then the variance's interpolation.

    `remat` keeps only the blocks' inputs for the backward pass.
    """

    config: DiffusionConfig
    channels: int
    dtype: jnp.dtype | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x_NC: jax.Array, t_N: jax.Array, z_NW: jax.Array) -> jax.Array:
        width = self.config.width
        y = TimestepEmbed(width, "diffusion", self.dtype, many=True, name="time_embed")(t_N)
        y = y + dense(width, ("embed", "diffusion"), init=XAVIER, dtype=self.dtype, name="cond_embed")(z_NW)
        x = dense(width, ("latent", "diffusion"), init=XAVIER, dtype=self.dtype, name="input_proj")(x_NC)
        x, y = split_rows(x), split_rows(y)
        blocks = nn.scan(
            nn.remat(ResBlock, prevent_cse=False) if self.remat else ResBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.config.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = blocks(width, self.dtype, name="blocks")(x, y)
        modulation = dense(2 * width, (None, "diffusion"), init=ZEROS, dtype=self.dtype, name="final_ada_lin")
        shift, scale = jnp.split(split_rows(modulation(nn.silu(y))), 2, axis=-1)
        x = _layer_norm(x).astype(x.dtype) * (1 + scale) + shift
        out = dense(2 * self.channels, ("diffusion", "latent"), init=ZEROS, dtype=self.dtype, name="final_linear")(x)
        return out.astype(jnp.float32)
