"""Structural similarity (Wang et al. 2004).

Letters: B images of H by W pixels, C channels.
"""

import jax
import jax.numpy as jnp
import numpy as np

SIGMA, SIDE = 1.5, 11
C1, C2 = 0.01**2, 0.03**2
_taps = np.exp(-0.5 * ((np.arange(SIDE) - SIDE // 2) / SIGMA) ** 2)
WINDOW = tuple(float(tap) for tap in _taps / _taps.sum())


def ssim(a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
    """(B,) float32 similarities, at most 1, of images in [-1, 1], which are compared as ones in [0, 1].

    The window is Gaussian, of 11 by 11 pixels and sigma 1.5; K1 is 0.01, K2 0.03. The mean is over channels and over
    the pixels whose whole window lies in the image: scikit-image's `structural_similarity(a, b, sigma=1.5,
    gaussian_weights=True, use_sample_covariance=False, data_range=1, channel_axis=-1)`.

    Raises:
      ValueError: images of different shapes, or smaller than the window.
    """
    if a_BHWC.shape != b_BHWC.shape or min(a_BHWC.shape[1:3]) < SIDE:
        raise ValueError(f"SSIM of {a_BHWC.shape} and {b_BHWC.shape}: need one shape, of {SIDE} px or more a side")
    # Variances do not change with the origin; around 0 they lose fewer digits.
    a, b = jnp.asarray(a_BHWC, jnp.float32) / 2, jnp.asarray(b_BHWC, jnp.float32) / 2
    mean_a, mean_b, square_a, square_b, product = _blur(jnp.stack([a, b, a * a, b * b, a * b]))
    variances = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    mean_a, mean_b = mean_a + 0.5, mean_b + 0.5
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return jnp.mean(luminance * (2 * covariance + C2) / (variances + C2), axis=(1, 2, 3))


def _blur(maps_XBHWC: jax.Array) -> jax.Array:
    """Means over the window around every pixel where it fits: (X, B, H - 10, W - 10, C)."""
    for axis in (2, 3):
        size = maps_XBHWC.shape[axis] - SIDE + 1
        # A sum of shifts, not a convolution, which GPUs and TPUs would round to fewer digits.
        shifts = [jax.lax.slice_in_dim(maps_XBHWC, start, start + size, axis=axis) for start in range(SIDE)]
        maps_XBHWC = sum((tap * shift for tap, shift in zip(WINDOW, shifts, strict=True)), start=jnp.float32(0))
    return maps_XBHWC
