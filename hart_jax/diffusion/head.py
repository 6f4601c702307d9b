"""The network of the residual diffusion head: a per-token MLP with adaptive norms (SPEC.md section 4; MAR)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hart_jax.config import DiffusionConfig
from hart_jax.nn.layers import TimestepEmbed, dense, shard_batch

ZEROS = nn.initializers.zeros
XAVIER = nn.initializers.xavier_uniform()


def _layer_norm(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.mean((x - mean) ** 2, -1, keepdims=True) + 1e-6)


class ResBlock(nn.Module):
    """x += gate * MLP(LN(x) * (1 + scale) + shift), modulated by y, SiLU applied; a scan body with carry x."""

    width: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_NW: jax.Array, y_NW: jax.Array):
        modulation = dense(3 * self.width, (None, "diffusion"), init=ZEROS, dtype=self.dtype, name="ada_lin")
        shift, scale, gate = jnp.split(shard_batch(modulation(y_NW)), 3, axis=-1)
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("diffusion",))
        zeros = nn.with_logical_partitioning(ZEROS, ("diffusion",))
        h = _layer_norm(x_NW) * self.param("norm_scale", ones, (self.width,))
        h = (h + self.param("norm_bias", zeros, (self.width,))).astype(x_NW.dtype)
        h = h * (1 + scale) + shift
        h = dense(self.width, ("diffusion", None), init=XAVIER, dtype=self.dtype, name="linear_1")(shard_batch(h))
        h = dense(self.width, (None, "diffusion"), init=XAVIER, dtype=self.dtype, name="linear_2")(
            nn.silu(shard_batch(h))
        )
        return shard_batch(x_NW + gate * h), None


class DiffusionHead(nn.Module):
    """(x_t (N, C), t (N,) or (1,) in 0..999, `embed` of z (N, W)) -> (N, 2C) float32: the noise, then the variance's
    interpolation.

    `remat` keeps only the blocks' inputs for the backward pass; `unroll` compiles every block by itself.
    """

    config: DiffusionConfig
    channels: int
    dtype: jnp.dtype | None = None
    remat: bool = False
    unroll: bool = False

    def setup(self):
        width, dtype = self.config.width, self.dtype
        self.time_embed = TimestepEmbed(width, "diffusion", dtype, many=True)
        self.cond_embed = dense(width, ("embed", "diffusion"), init=XAVIER, dtype=dtype, name="cond_embed")
        self.input_proj = dense(width, ("latent", "diffusion"), init=XAVIER, dtype=dtype, name="input_proj")
        scanned = nn.scan(
            nn.remat(ResBlock, prevent_cse=False) if self.remat else ResBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.config.depth,
            unroll=self.config.depth if self.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.blocks = scanned(width, dtype)
        self.final_ada_lin = dense(2 * width, (None, "diffusion"), init=ZEROS, dtype=dtype, name="final_ada_lin")
        out_axes = ("diffusion", "latent")
        self.final_linear = dense(2 * self.channels, out_axes, init=ZEROS, dtype=dtype, name="final_linear")

    def embed(self, z_NW: jax.Array) -> jax.Array:
        """The condition as the network sees it, (N, width)."""
        return self.cond_embed(z_NW)

    def __call__(self, x_NC: jax.Array, t_N: jax.Array, embedded_NW: jax.Array) -> jax.Array:
        y = nn.silu(shard_batch(embedded_NW + self.time_embed(t_N)))
        x, _ = self.blocks(shard_batch(self.input_proj(x_NC)), y)
        shift, scale = jnp.split(shard_batch(self.final_ada_lin(y)), 2, axis=-1)
        x = _layer_norm(x).astype(x.dtype) * (1 + scale) + shift
        return self.final_linear(x).astype(jnp.float32)
