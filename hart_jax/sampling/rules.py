"""Rules of sampling: which codes stay, how strong guidance is, what an iteration fills (SPEC.md section 3)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.config import SampleConfig


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


def progress(scale: int, scales: int) -> float:
    """0..1 over the scales; at the last one it stays what it was."""
    return min(scale, scales - 2) / (scales - 1)


def growing_guidance(settings: SampleConfig, scale: int, scales: int) -> float:
    """t in (1 + t) cond - t uncond: none at the first scale, almost `cfg` at the last."""
    return settings.cfg * progress(scale, scales)


def iterations_of_the_last(settings: SampleConfig, scale: int, scales: int) -> int:
    """`masked_iterations` at the last scale, one at the others."""
    return settings.masked_iterations if scale == scales - 1 else 1


@dataclasses.dataclass(frozen=True)
class Rules:
    """What of sampling is a rule rather than a number: HART's, unless another is given.

    `guidance` gives t in (1 + t) cond - t uncond, and `iterations` in how many steps a scale's positions are filled, at
    least 1, at most as many as there are; both are asked with (settings, scale, scales). `negative` is the condition
    in place of nothing: text states (1, T, D) and mask (1, T) with the model's T, or a label (1,).
    """

    guidance: Callable[[SampleConfig, int, int], float] = growing_guidance
    iterations: Callable[[SampleConfig, int, int], int] = iterations_of_the_last
    negative: Any = None


HART_RULES = Rules()
