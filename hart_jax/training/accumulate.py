"""Gradient accumulation: a batch in several parts, one after the other, where memory does not hold it at once."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange


def accumulate_microbatches(compute: Callable[[Any], tuple[Any, Any]], batch: Any, count: int) -> tuple[Any, Any]:
    """Means of `compute` over a batch in `count` parts, one after the other.

    Args:
      compute: from arrays (b, ...) of some samples to two trees: float32 means over samples, and arrays
        (b, ...) of one row a sample.
      batch: arrays (B, ...), B a multiple of `count`. All randomness is among them, drawn per sample: then the result
        does not depend on `count`, up to rounding.

    Returns:
      the same two trees for the whole batch.
    """
    if count == 1:
        return compute(batch)
    split = jax.tree.map(lambda x: _split(x, count), batch)
    means, _ = jax.eval_shape(compute, jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), means)

    def add(total: Any, microbatch: Any) -> tuple[Any, Any]:
        means, kept = compute(microbatch)
        return jax.tree.map(jnp.add, total, means), kept

    total, kept = jax.lax.scan(add, zeros, split)
    return jax.tree.map(lambda leaf: leaf / count, total), jax.tree.map(_join, kept)


def _split(x: jax.Array, count: int) -> jax.Array:
    """(B, ...) -> (count, B / count, ...): part i has rows i, i + count, ..., so that every device keeps its own."""
    x = rearrange(x, "(rows count) ... -> count rows ...", count=count)
    return nn.with_logical_constraint(x, (None, "batch") + (None,) * (x.ndim - 2))


def _join(x: jax.Array) -> jax.Array:
    """What `_split` takes apart."""
    return rearrange(x, "count rows ... -> (rows count) ...")
