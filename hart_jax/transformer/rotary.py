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


def rotate(x_BLHK: jax.Array, angle_BLK: jax.Array) -> jax.Array:
    """Applies angles to queries or keys; float32 inside."""
    x = x_BLHK.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    swapped = jnp.concatenate([-second, first], axis=-1)
    angle = angle_BLK[:, :, None]
    return (x * jnp.cos(angle) + swapped * jnp.sin(angle)).astype(x_BLHK.dtype)
