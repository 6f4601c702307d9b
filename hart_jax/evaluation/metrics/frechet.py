"""The Frechet distance of two sets of features as if both were Gaussian (Heusel et al. 2017).

With InceptionV3's pool features it is the FID; with those of another network it is not comparable to any FID.
Letters: N and M images, F features.
"""

import numpy as np

from hart_jax.errors import UserError

# Random vectors more than the rank, so that none of its directions is missed.
_MORE = 10


def frechet_distance(a_NF: np.ndarray, b_MF: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr sqrt(A B) of the unbiased covariances A and B, in float64, never
    below 0.

    tr sqrt(A B) is the sum of the roots of the eigenvalues of sqrt(A) B sqrt(A), which are the singular values of
    sqrt(A) sqrt(B). Taken as singular values they are exact to rounding also where they are 0, as most are with fewer
    images than features; roots of eigenvalues would keep half the digits there. A set against itself gives 0 to 1e-12
    of tr(A).

    Raises:
      UserError: fewer than two images in a set.
      ValueError: sets of different widths.
    """
    if a_NF.shape[1] != b_MF.shape[1]:
        raise ValueError(
            f"Frechet distance of {a_NF.shape[1]} and {b_MF.shape[1]} features: both sets need the same network"
        )
    if min(len(a_NF), len(b_MF)) < 2:
        raise UserError(f"Frechet distance of {len(a_NF)} and {len(b_MF)} images: needs 2 or more of both")
    (mean_a, covariance_a), (mean_b, covariance_b) = _mean_and_covariance(a_NF), _mean_and_covariance(b_MF)
    root_a, root_b = _root(covariance_a, len(a_NF) - 1), _root(covariance_b, len(b_MF) - 1)
    shared = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
    apart = np.sum((mean_a - mean_b) ** 2)
    return max(0.0, float(apart + (np.trace(covariance_a) + np.trace(covariance_b)) - 2 * shared))


def _mean_and_covariance(features_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(F,) and (F, F), unbiased: `np.cov` with one copy of the features less, in float64."""
    centred_NF = features_NF.astype(np.float64)
    mean_F = centred_NF.mean(axis=0)
    centred_NF -= mean_F
    return mean_F, centred_NF.T @ centred_NF / (len(features_NF) - 1)


def _root(covariance_FF: np.ndarray, rank: int) -> np.ndarray:
    """(F, R) with root root^T the covariance; directions that only rounding gives a variance are left out.

    Of few images the covariance has a low `rank`, at most. All it maps to is then spanned by what it makes of so many
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
