"""Rotary positions: one axis for the context, two for image tokens (SPEC.md section 2).

Angles are (..., K), one for every channel of a head. Halves are rotated against each other as in Llama, also for image
tokens, whose angle vector is [row, row, col, col]: there the two halves have angles of different axes.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _frequencies(count: int, stride: int, head_dim: int) -> np.ndarray:
    return (10000.0 ** (-np.arange(count) * stride / head_dim)).astype(np.float32)


def context_angles(position: jax.Array, head_dim: int) -> jax.Array:
    """Angles (..., K) of context positions (...)."""
    angle = position[..., None].astype(jnp.float32) * _frequencies(head_dim // 2, 2, head_dim)
    return jnp.concatenate([angle, angle], axis=-1)


def image_angles(index: jax.Array, side: int, last_side: int, offset: jax.Array, head_dim: int) -> jax.Array:
    """Angles (..., K) of the tokens `index` (...) of the scale with this side.

    `offset` (broadcast to index) is the last context position; rows and columns count in tokens of the last scale.
    """
    frequencies = _frequencies(head_dim // 4, 4, head_dim)
    # A rounded quotient first, as the reference: at 1024 px the order shows in the last bit.
    row = (index // side).astype(jnp.float32) / side * last_side + offset
    col = (index % side).astype(jnp.float32) / side * last_side + offset
    row, col = row[..., None] * frequencies, col[..., None] * frequencies
    return jnp.concatenate([row, row, col, col], axis=-1)


def turns(angle_BLK: jax.Array) -> jax.Array:
    """(B, L, 2, K): cosines and sines of angles, to be computed once for all layers and heads."""
    return jnp.stack([jnp.cos(angle_BLK), jnp.sin(angle_BLK)], axis=-2)


def turn(x_BLHK: jax.Array, turns_BL2K: jax.Array) -> jax.Array:
    """Rotates queries or keys by `turns`; float32 inside."""
    x = x_BLHK.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    swapped = jnp.concatenate([-second, first], axis=-1)
    cos, sin = (turns_BL2K[:, :, None, part] for part in range(2))
    return (x * cos + swapped * sin).astype(x_BLHK.dtype)
