"""The kernel inception distance: squared maximum mean discrepancy of features (Binkowski et al. 2018).

The kernel is (x . y / F + 1)^3 and the estimate the unbiased one, in float64, so it can be below 0. Letters: N and M
images, F features.
"""

from collections.abc import Iterator

import numpy as np

from hart_jax.errors import UserError


def kid(
    a_NF: np.ndarray, b_MF: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets, as published numbers are; see `kid_full` for one without chance.

    Every subset is drawn without replacement, of min(subset_size, N, M) images of both sets; say that number beside
    the result. Which images it has depends on the seed and on their order in the arrays. The deviation (of the
    subsets' estimates, divisor `subsets`) says how much one subset varies, not how exact the mean is.

    Raises:
      UserError: fewer than two images in a set, or no subsets.
      ValueError: sets of different widths.
    """
    _check(a_NF, b_MF)
    size = min(subset_size, len(a_NF), len(b_MF))
    if subsets < 1 or size < 2:
        raise UserError(f"KID of subsets={subsets} of subset_size={subset_size}: needs 1 or more, of 2 images or more")
    rng = np.random.default_rng(seed)
    estimates = []
    for _ in range(subsets):
        a, b = (features[rng.choice(len(features), size, replace=False)] for features in (a_NF, b_MF))
        estimates.append(kid_full(a, b, block=size))
    return float(np.mean(estimates)), float(np.std(estimates))


def kid_full(a_NF: np.ndarray, b_MF: np.ndarray, block: int = 2048) -> float:
    """The unbiased estimate from all images, of which blocks of `block` by `block` kernel values are held at a time.

    For independent samples of one distribution its expectation is 0. Of one set against itself it is below 0, by
    2 / (N - 1) times (the kernel's mean over pairs of an image with itself - its mean over all pairs).

    Raises:
      UserError: fewer than two images in a set.
      ValueError: sets of different widths.
    """
    _check(a_NF, b_MF)
    within = sum(_within(own, block) / (len(own) * (len(own) - 1)) for own in (a_NF, b_MF))
    return within - 2 * _kernel_sum(a_NF, b_MF, block) / (len(a_NF) * len(b_MF))


def _check(a_NF: np.ndarray, b_MF: np.ndarray) -> None:
    if a_NF.shape[1] != b_MF.shape[1]:
        raise ValueError(f"KID of {a_NF.shape[1]} and {b_MF.shape[1]} features: both sets need the same network")
    if min(len(a_NF), len(b_MF)) < 2:
        raise UserError(f"KID of {len(a_NF)} and {len(b_MF)} images: needs 2 or more of both")


def _within(a_NF: np.ndarray, block: int) -> float:
    """The kernel's sum over all pairs of two different images."""
    own = sum(float(np.sum(_kernel(np.sum(part**2, axis=1), part.shape[1]))) for part in _parts(a_NF, block))
    return _kernel_sum(a_NF, a_NF, block) - own


def _kernel_sum(a_NF: np.ndarray, b_MF: np.ndarray, block: int) -> float:
    """The kernel's sum over all pairs (x, y)."""
    total = 0.0
    for x in _parts(a_NF, block):
        for y in _parts(b_MF, block):
            total += float(np.sum(_kernel(x @ y.T, x.shape[1])))
    return total


def _kernel(products: np.ndarray, width: int) -> np.ndarray:
    return (products / width + 1) ** 3


def _parts(a_NF: np.ndarray, block: int) -> Iterator[np.ndarray]:
    """Of `block` images, in float64."""
    return (np.asarray(a_NF[start : start + block], np.float64) for start in range(0, len(a_NF), block))
