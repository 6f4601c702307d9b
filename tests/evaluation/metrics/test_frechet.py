import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from hart_jax.errors import UserError
from hart_jax.evaluation.metrics.frechet import frechet_distance


def features(count: int, width: int, seed: int) -> np.ndarray:
    """Correlated, with deviations over three orders of magnitude."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, width)) * np.logspace(0, -3, width) @ rng.normal(size=(width, width))
    return mixed + rng.normal(size=width)


@settings(max_examples=20)
@given(st.integers(2, 24), st.integers(0, 99))
def test_it_is_the_formula_with_a_matrix_square_root(width, seed):
    a, b = features(3 * width, width, seed), 1.5 * features(2 * width, width, seed + 100)
    cov_a, cov_b = (np.cov(images, rowvar=False) for images in (a, b))
    root = np.trace(sqrtm(cov_a @ cov_b)).real
    expected = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    ours = frechet_distance(a, b)
    assert ours == pytest.approx(expected, rel=1e-6)
    assert ours == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_fewer_images_than_features():
    a, b = features(7, 40, 0), features(9, 40, 1)
    # The same root from the images: their centred products' singular values.
    centred = [(images - images.mean(axis=0)) / np.sqrt(len(images) - 1) for images in (a, b)]
    root = np.linalg.norm(centred[0] @ centred[1].T, ord="nuc")
    expected = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + sum(np.sum(part**2) for part in centred) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@settings(max_examples=20)
@given(st.integers(2, 60), st.integers(1, 40), st.integers(0, 99))
def test_a_set_has_no_distance_from_itself(count, width, seed):
    ours = features(count, width, seed)
    assert 0 <= frechet_distance(ours, ours) <= 1e-12 * np.var(ours, axis=0, ddof=1).sum()


def test_one_feature():
    a, b = np.array([[0.0], [2.0], [4.0]]), np.array([[1.0], [2.0]])
    # Means 2 and 1.5, variances 4 and 0.5.
    assert frechet_distance(a, b) == pytest.approx(0.25 + (2 - np.sqrt(0.5)) ** 2)


def test_images_that_are_all_the_same():
    a, b = np.zeros((3, 4)), np.full((2, 4), 0.5)
    assert frechet_distance(a, a) == 0
    assert frechet_distance(a, b) == 1


def test_sets_it_cannot_compare():
    two = features(2, 3, 0)
    with pytest.raises(UserError, match="of 2 and 1 images: needs 2 or more"):
        frechet_distance(two, np.zeros((1, 3)))
    with pytest.raises(ValueError, match="3 and 2 features"):
        frechet_distance(two, np.zeros((2, 2)))


def test_float32_features_far_from_0_are_summed_in_float64():
    a, b = (1e3 + features(50, 5, seed).astype(np.float32) for seed in (0, 1))
    assert a.dtype == np.float32
    a_before, doubles = a.copy(), [images.astype(np.float64) - 1e3 for images in (a, b)]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(*doubles), rel=1e-9)
    np.testing.assert_array_equal(a, a_before)
