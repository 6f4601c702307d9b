"""The type that a model computes in."""

import jax
import jax.numpy as jnp


def compute_dtype(setting: str, platform: str = "") -> jnp.dtype:
    """ "auto" is bfloat16 where the platform (empty: this machine's) multiplies it natively, float32 on CPUs."""
    if setting == "auto":
        accelerated = (platform or jax.default_backend()) in ("tpu", "gpu", "cuda", "rocm")
        return jnp.dtype(jnp.bfloat16 if accelerated else jnp.float32)
    return jnp.dtype(setting)
