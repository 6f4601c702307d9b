"""Layers that the transformer and the diffusion head share, with logical axis names on every parameter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Axes = tuple[str | None, ...]


def dense(
    features: int, axes: Axes, *, name: str, bias: bool = True, init=None, dtype: jnp.dtype | None = None
) -> nn.Dense:
    """A linear layer whose kernel has these two logical axes."""
    init = nn.initializers.truncated_normal(0.02) if init is None else init
    return nn.Dense(
        features,
        use_bias=bias,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-1:]),
        dtype=dtype,
        name=name,
    )


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32, returned in the type of x."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale of logical axis `axis`."""

    eps: float = 1e-6
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        return rms_norm(x, self.param("scale", init, (x.shape[-1],)), self.eps)


def sinusoidal(t_N: jax.Array, width: int = 256, max_period: float = 10000.0) -> jax.Array:
    """(N, width) float32: cosines, then sines, of t times frequencies 1 .. 1/max_period."""
    half = width // 2
    frequencies = jnp.asarray(np.exp(-np.log(max_period) * np.arange(half, dtype=np.float32) / half))
    angles = t_N.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbed(nn.Module):
    """sinusoidal(256) -> Linear, SiLU, Linear to (N, features)."""

    features: int
    axis: str
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, t_N: jax.Array) -> jax.Array:
        h = dense(self.features, (None, self.axis), name="linear_1", dtype=self.dtype)(sinusoidal(t_N))
        return dense(self.features, (None, self.axis), name="linear_2", dtype=self.dtype)(nn.silu(h))
