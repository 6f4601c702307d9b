"""Rotary positions: one axis for the context, two for image tokens (SPEC.md section 2).

Angles are (..., K), one for every channel of a head. Halves are rotated against each other as in Llama, also for image
tokens, whose angle vector is [row, row, col, col]: there the two halves have angles of different axes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.nn.layers import platform
from pallas_kernels.attention.counted import uncounted


def _frequencies(count: int, stride: int, head_dim: int) -> np.ndarray:
    return (10000.0 ** (-np.arange(count) * stride / head_dim)).astype(np.float32)


def context_angles(position: jax.Array, head_dim: int) -> jax.Array:
    """Angles (..., K) of context positions (...)."""
    angle = position[..., None].astype(jnp.float32) * _frequencies(head_dim // 2, 2, head_dim)
    return jnp.concatenate([angle, angle], axis=-1)


def image_angles(
    index: jax.Array, shape: tuple[int, int], last_shape: tuple[int, int], offset: jax.Array, head_dim: int
) -> jax.Array:
    """Angles (..., K) of the tokens `index` (...) of a scale of this height and width.

    `offset` (broadcast to index) is the last context position; rows and columns count in tokens of the last scale.
    """
    frequencies = _frequencies(head_dim // 4, 4, head_dim)
    # A rounded quotient first, as the reference: at 1024 px the order shows in the last bit.
    (height, width), (last_height, last_width) = shape, last_shape
    row = (index // width).astype(jnp.float32) / height * last_height + offset
    col = (index % width).astype(jnp.float32) / width * last_width + offset
    row, col = row[..., None] * frequencies, col[..., None] * frequencies
    return jnp.concatenate([row, row, col, col], axis=-1)


def rotary_cos_sin(angle_BLK: jax.Array) -> jax.Array:
    """(B, L, 2, K): cosines and sines of angles, to be computed once for all layers and heads."""
    return jnp.stack([jnp.cos(angle_BLK), jnp.sin(angle_BLK)], axis=-2)


def apply_rotary(x_BLHK: jax.Array, cos_sin_BL2K: jax.Array) -> jax.Array:
    """Rotates queries or keys by `rotary_cos_sin`; float32 inside."""
    cos, sin = (cos_sin_BL2K[:, :, None, part] for part in range(2))
    # XLA writes halves of a TPU's lanes to memory before it joins them, and fuses the product with what follows.
    swapped = rotate_half_by_matmul(x_BLHK) if platform() == "tpu" else rotate_half(x_BLHK)
    return (x_BLHK.astype(jnp.float32) * cos + swapped * sin).astype(x_BLHK.dtype)


def rotate_half(x_BLHK: jax.Array) -> jax.Array:
    """float32: minus the second half of the last axis, then the first."""
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


@uncounted
def rotate_half_by_matmul(x_BLHK: jax.Array) -> jax.Array:
    """`rotate_half` as a product with a permutation with signs, which is exact."""
    half = x_BLHK.shape[-1] // 2
    signs = np.concatenate([np.ones(half), -np.ones(half)])
    permutation_KJ = np.roll(np.diag(signs), half, axis=1)
    return jnp.einsum(
        "blhk,kj->blhj",
        x_BLHK,
        jnp.asarray(permutation_KJ, x_BLHK.dtype),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
