import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hart_jax.errors import UserError
from hart_jax.evaluation.metrics.kid import kid, kid_full


def features(count: int, seed: int, width: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)) + 0.3


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3


def naive(a: np.ndarray, b: np.ndarray) -> float:
    n, m = len(a), len(b)
    same_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    same_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return same_a + same_b - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m)


@settings(max_examples=25)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 6), st.integers(1, 12), st.integers(0, 99))
def test_it_is_the_sum_over_pairs(n, m, width, block, seed):
    a, b = features(n, seed, width), 2 * features(m, seed + 100, width)
    expected = pytest.approx(naive(a, b), rel=1e-11, abs=1e-11)
    assert kid_full(a, b, block=block) == expected
    assert kid_full(a[::-1], b) == expected
    assert kid_full(b, a) == expected


def test_subsets_of_all_images_are_all_images():
    a, b = features(9, 0), features(9, 1)
    mean, deviation = kid(a, b, subsets=5)
    assert mean == pytest.approx(naive(a, b), rel=1e-11)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_the_mean_over_many_subsets_is_the_whole_estimate():
    a, b = features(12, 0), 1.5 * features(20, 1)
    subsets = 2000
    mean, deviation = kid(a, b, subsets=subsets, subset_size=6)
    assert abs(mean - kid_full(a, b)) < 4 * deviation / np.sqrt(subsets)
    # The smaller set limits the subsets.
    assert kid(a, b, subsets=3) == kid(a, b, subsets=3, subset_size=12)


def test_a_seed_draws_the_same_subsets():
    a, b = features(12, 0), features(20, 1)
    assert kid(a, b, subsets=3, subset_size=6, seed=1) == kid(a, b, subsets=3, subset_size=6, seed=1)
    assert kid(a, b, subsets=3, subset_size=6, seed=1) != kid(a, b, subsets=3, subset_size=6, seed=2)


def test_samples_of_one_distribution_are_at_zero_on_average():
    estimates = [kid_full(features(10, seed), features(14, seed + 1000)) for seed in range(400)]
    assert abs(np.mean(estimates)) < 4 * np.std(estimates) / np.sqrt(len(estimates))
    assert min(estimates) < 0


def test_a_set_against_itself_is_as_far_below_zero_as_stated():
    a = features(8, 0)
    values = np.array([[kernel(x, y) for y in a] for x in a])
    expected = -2 / 7 * (np.diag(values).mean() - values.mean())
    assert expected < 0
    assert kid_full(a, a) == pytest.approx(expected, rel=1e-11)


def test_sets_it_cannot_compare():
    with pytest.raises(UserError, match="1 and 3 images"):
        kid_full(features(1, 0), features(3, 0))
    with pytest.raises(UserError, match="subset_size=1"):
        kid(features(3, 0), features(3, 0), subset_size=1)
    with pytest.raises(ValueError, match="4 and 5 features"):
        kid(features(3, 0), features(3, 0, width=5))
