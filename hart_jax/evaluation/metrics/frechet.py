"""The Frechet distance of two sets of features as if both were Gaussian (Heusel et al. 2017).

With InceptionV3's pool features it is the FID; with those of another network it is not comparable to any FID.
"""

import numpy as np

from hart_jax.evaluation.metrics.moments import Moments

# Random vectors more than the rank, so that none of its directions is missed.
_MORE = 10


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr sqrt(A B) of the unbiased covariances A and B, in float64, never
    below 0.

    tr sqrt(A B) is the sum of the roots of the eigenvalues of sqrt(A) B sqrt(A), which are the singular values of
    sqrt(A) sqrt(B). Taken as singular values they are exact to rounding also where they are 0, as most are with fewer
    pictures than features; roots of eigenvalues would keep half the digits there. Identical moments give 0 to 1e-12
    of tr(A).

    Raises:
      UserError: fewer than two pictures in a set.
      ValueError: sets of different widths.
    """
    if a.width != b.width:
        raise ValueError(f"Frechet distance of {a.width} and {b.width} features: both sets need the same network")
    covariances = a.covariance, b.covariance
    root_a, root_b = (_root(each, moments.count - 1) for each, moments in zip(covariances, (a, b), strict=True))
    shared = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
    apart = np.sum((a.mean_F - b.mean_F) ** 2)
    return max(0.0, float(apart + sum(np.trace(covariance) for covariance in covariances) - 2 * shared))


def _root(covariance_FF: np.ndarray, rank: int) -> np.ndarray:
    """(F, R) with root root^T the covariance; directions that only rounding gives a variance are left out.

    Of few pictures the covariance has a low `rank`, at most. All it maps to is then spanned by what it makes of so many
    random vectors (Halko et al., arXiv 0909.4061), and a small eigenvalue problem is left.
    """
    width = len(covariance_FF)
    if rank + _MORE < width // 2:
        random_FR = np.random.default_rng(0).normal(size=(width, rank + _MORE))
        basis_FR, _ = np.linalg.qr(covariance_FF @ random_FR)
        return basis_FR @ _root(basis_FR.T @ covariance_FF @ basis_FR, width)
    variances, directions = np.linalg.eigh(covariance_FF)
    kept = variances > variances[-1] * len(variances) * np.finfo(np.float64).eps
    return directions[:, kept] * np.sqrt(variances[kept])
