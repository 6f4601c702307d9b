"""The type that a model computes in, and weights in that type."""

from typing import Any

import jax
import jax.numpy as jnp


def compute_dtype(setting: str, platform: str = "") -> jnp.dtype:
    """ "auto" is bfloat16 where the platform (empty: this machine's) multiplies it natively, float32 on CPUs."""
    if setting == "auto":
        accelerated = (platform or jax.default_backend()) in ("tpu", "gpu", "cuda", "rocm")
        return jnp.dtype(jnp.bfloat16 if accelerated else jnp.float32)
    return jnp.dtype(setting)


def cast_weights(transformer: Any, dtype: Any) -> Any:
    """The transformer's parameters with those matrices in the compute type that its products round to it in any case.

    Given float32 ones, a program would first make a copy of the whole stack of layers.
    """
    if dtype in (None, jnp.float32):
        return transformer

    def narrow(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [str(getattr(key, "key", "")) for key in path]
        rounded = names[0] in ("layers", "diffusion_head") and names[-1] in ("kernel", "qkv")
        return leaf.astype(dtype) if rounded else leaf

    return jax.tree_util.tree_map_with_path(narrow, transformer)
