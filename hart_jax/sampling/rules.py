"""Rules of sampling: which codes stay, and how many positions an iteration fills (SPEC.md section 3)."""

import jax
import jax.numpy as jnp
import numpy as np


def keep_top(logits_V: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits (..., V) with -inf outside the `top_k` largest (0: all) and the nucleus of mass `top_p` (1: all)."""
    if 0 < top_k < logits_V.shape[-1]:
        logits_V = jnp.where(logits_V < kth_largest(logits_V, top_k), -jnp.inf, logits_V)
    if top_p < 1:
        ascending = jnp.sort(logits_V, axis=-1)
        outside = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - top_p
        # The largest always stays; the smallest that stays is the threshold.
        outside = outside.at[..., -1].set(False)
        threshold = jnp.min(jnp.where(outside, jnp.inf, ascending), axis=-1, keepdims=True)
        logits_V = jnp.where(logits_V < threshold, -jnp.inf, logits_V)
    return logits_V


def kth_largest(x_V: jax.Array, k: int) -> jax.Array:
    """The k-th largest of float32 values (..., V), exactly, as (..., 1): found bit by bit, where sorting costs more."""
    bits = jax.lax.bitcast_convert_type(x_V.astype(jnp.float32), jnp.int32)
    # As unsigned integers in the order of the floats.
    ordered = jax.lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32)

    def add_bit(at, found):
        candidate = found | (jnp.uint32(1) << (31 - at).astype(jnp.uint32))
        enough = jnp.sum(ordered >= candidate, axis=-1, keepdims=True) >= k
        return jnp.where(enough, candidate, found)

    found = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros((*x_V.shape[:-1], 1), jnp.uint32))
    found = jax.lax.bitcast_convert_type(found, jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.where(found < 0, found ^ jnp.int32(-(2**31)), ~found), jnp.float32)


def iteration_sizes(positions: int, iterations: int) -> list[int]:
    """How many of the last scale's positions each masked iteration fills."""
    left, sizes = positions, []
    for iteration in range(iterations):
        later = int(np.floor(positions * np.cos(np.pi / 2 * (iteration + 1) / iterations)))
        later = 0 if iteration == iterations - 1 else max(1, min(left - 1, later))
        sizes.append(left - later)
        left = later
    return sizes
