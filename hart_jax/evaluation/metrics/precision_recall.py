"""Improved precision and recall (Kynkaanniemi et al. 2019).

A set's manifold is the union of balls around its images' features, each as wide as the distance to the k-th nearest
other image of the set. Letters: N and M images, F features.
"""

import numpy as np

from hart_jax.errors import UserError

# Of squared distances, as a part of the squared norms: far above their rounding, far below that of float32 features.
SLACK = 1e-10


def precision_recall(real_NF: np.ndarray, fake_MF: np.ndarray, k: int = 3, block: int = 2048) -> tuple[float, float]:
    """The share of fake images in the real manifold, and of real ones in the fake manifold.

    Distances are Euclidean, in float64, of which `block` by `block` are held at a time. An image on a ball's surface,
    to rounding, is inside, so duplicates and the block size change nothing.

    Raises:
      UserError: k is below 1, or a set has no more than k images.
      ValueError: sets of different widths.
    """
    if real_NF.shape[1] != fake_MF.shape[1]:
        raise ValueError(f"precision of {real_NF.shape[1]} and {fake_MF.shape[1]} features: need the same network")
    for name, count in (("real", len(real_NF)), ("fake", len(fake_MF))):
        if not 1 <= k < count:
            raise UserError(f"precision and recall with k={k} of {count} {name} images: k must be 1 to {count - 1}")
    real_NF, fake_MF = np.asarray(real_NF, np.float64), np.asarray(fake_MF, np.float64)
    return _share_inside(fake_MF, real_NF, k, block), _share_inside(real_NF, fake_MF, k, block)


def _share_inside(points_MF: np.ndarray, centres_NF: np.ndarray, k: int, block: int) -> float:
    inside_M = np.zeros(len(points_MF), bool)
    for rows in _ranges(len(centres_NF), block):
        radii = _squared_radii(centres_NF, rows, k, block)
        for columns in _ranges(len(points_MF), block):
            distances, slack = _squared_distances(centres_NF[rows], points_MF[columns])
            inside_M[columns] |= (distances <= radii[:, None] + slack).any(axis=0)
    return float(inside_M.mean())


def _squared_radii(points_NF: np.ndarray, rows: slice, k: int, block: int) -> np.ndarray:
    """Squared distances of the points in `rows` to their k-th nearest other points."""
    nearest = np.full((len(points_NF[rows]), k), np.inf)
    for columns in _ranges(len(points_NF), block):
        distances, _ = _squared_distances(points_NF[rows], points_NF[columns])
        if rows == columns:
            np.fill_diagonal(distances, np.inf)
        nearest = np.partition(np.concatenate([nearest, distances], axis=1), k - 1, axis=1)[:, :k]
    return nearest[:, k - 1]


def _squared_distances(a_NF: np.ndarray, b_MF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, M) squared distances, and how far from them rounding may at most have led."""
    norms = np.sum(a_NF**2, axis=1)[:, None] + np.sum(b_MF**2, axis=1)
    return norms - 2 * (a_NF @ b_MF.T), SLACK * norms


def _ranges(count: int, block: int) -> list[slice]:
    return [slice(start, start + block) for start in range(0, count, block)]
