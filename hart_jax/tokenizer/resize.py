"""Resizing between scales, as linear maps with the weights PyTorch uses (SPEC.md section 1, traps)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.config.scales import Shape


@functools.cache
def area_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Adaptive average pooling along one side, (size_out, size_in); windows overlap where the sides do not divide."""
    weights = np.zeros((size_out, size_in), np.float32)
    for row in range(size_out):
        start, stop = row * size_in // size_out, -(-(row + 1) * size_in // size_out)
        weights[row, start:stop] = 1.0 / (stop - start)
    return weights


@functools.cache
def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Bicubic interpolation along one side, (size_out, size_in): a = -0.75, half-pixel centres, clamped edges."""
    a = -0.75
    centre = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    left = np.floor(centre).astype(int)
    weights = np.zeros((size_out, size_in), np.float64)
    for offset in range(-1, 3):
        x = np.abs(centre - (left + offset))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        column = np.clip(left + offset, 0, size_in - 1)
        np.add.at(weights, (np.arange(size_out), column), np.where(x <= 1, near, far))
    return weights.astype(np.float32)


def area(x_BHWC: jax.Array, shape: Shape) -> jax.Array:
    """Adaptive average pooling to (B, *shape, C), `shape` being height and width."""
    return _resized(x_BHWC, shape, area_matrix)


def bicubic(x_BHWC: jax.Array, shape: Shape) -> jax.Array:
    """Bicubic interpolation to (B, *shape, C), `shape` being height and width."""
    return _resized(x_BHWC, shape, bicubic_matrix)


def _resized(x_BHWC: jax.Array, shape: Shape, matrix: Callable[[int, int], np.ndarray]) -> jax.Array:
    before = x_BHWC.shape[1:3]
    if before == shape:
        return x_BHWC
    rows, columns = (matrix(size_in, size_out) for size_in, size_out in zip(before, shape, strict=True))
    # Full precision: which code is nearest must not depend on the device.
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("ph,qw,bhwc->bpqc", rows, columns, x_BHWC, optimize=[(0, 2), (0, 1)], precision=precision)
