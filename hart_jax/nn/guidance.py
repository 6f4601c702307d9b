"""Classifier-free guidance."""

import jax
import jax.numpy as jnp


def guide(cond: jax.Array, uncond: jax.Array, t: float | jax.Array) -> jax.Array:
    """(1 + t) cond - t uncond, in the type of `cond`; t = 0 is `cond`.

    `t` is a number, or an array (2,) of 1 + t and t, each rounded by itself: so what is traced gives the same bits as a
    number that is compiled in.
    """
    if jnp.ndim(t) == 0:
        return (1 + t) * cond - t * uncond
    more, less = jnp.asarray(t, cond.dtype)
    return more * cond - less * uncond
