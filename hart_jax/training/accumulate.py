"""Gradient accumulation: a batch in several parts, one after the other, where memory does not hold it at once."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange


def in_parts(compute: Callable[[Any], tuple[Any, Any]], rows: Any, parts: int) -> tuple[Any, Any]:
    """`compute` of a batch, `parts` parts of it at a time.

    Args:
      compute: from arrays (b, ...) of some samples to two trees: float32 means over samples, and arrays
        (b, ...) of one row a sample.
      rows: arrays (B, ...), B a multiple of `parts`. All randomness is among them, drawn per sample: then the result
        does not depend on `parts`, up to rounding.

    Returns:
      the same two trees for the whole batch.
    """
    if parts == 1:
        return compute(rows)
    split = jax.tree.map(lambda x: _split(x, parts), rows)
    means, _ = jax.eval_shape(compute, jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), means)

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        means, kept = compute(part)
        return jax.tree.map(jnp.add, total, means), kept

    total, kept = jax.lax.scan(add, zeros, split)
    return jax.tree.map(lambda leaf: leaf / parts, total), jax.tree.map(_join, kept)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """(B, ...) -> (parts, B / parts, ...): part i has rows i, i + parts, ..., so that every device keeps its own."""
    x = rearrange(x, "(rows parts) ... -> parts rows ...", parts=parts)
    return nn.with_logical_constraint(x, (None, "batch") + (None,) * (x.ndim - 2))


def _join(x: jax.Array) -> jax.Array:
    """What `_split` takes apart."""
    return rearrange(x, "parts rows ... -> (rows parts) ...")
