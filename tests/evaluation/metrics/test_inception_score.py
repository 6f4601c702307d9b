import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from hart_jax.errors import UserError
from hart_jax.evaluation.metrics.inception_score import inception_score


def logits(count: int, classes: int = 6, seed: int = 0) -> np.ndarray:
    return 2 * np.random.default_rng(seed).normal(size=(count, classes))


def naive(given: np.ndarray) -> float:
    """H(marginal) - mean H(p), as an exponential."""
    p = softmax(given, axis=1)
    entropies = [-sum(q * math.log(q) for q in row) for row in (p.mean(axis=0), *p)]
    return math.exp(entropies[0] - sum(entropies[1:]) / len(p))


@given(st.integers(1, 30), st.integers(1, 10), st.integers(0, 99))
def test_it_is_the_definition_over_consecutive_splits(count, splits, seed):
    images, splits = logits(count, seed=seed), min(count, splits)
    bounds = [math.floor(part * count / splits) for part in range(splits + 1)]
    scores = [naive(images[bounds[part] : bounds[part + 1]]) for part in range(splits)]
    mean, deviation = inception_score(images, splits)
    assert mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert deviation == pytest.approx(np.std(scores), rel=1e-9, abs=1e-12)


@given(st.integers(0, 99))
def test_one_split_does_not_depend_on_order_or_on_a_constant(seed):
    images = logits(20)
    moved = np.random.default_rng(seed).permutation(images) + 1e3
    assert inception_score(moved, splits=1)[0] == pytest.approx(inception_score(images, splits=1)[0], rel=1e-11)


def test_the_least_and_the_most():
    assert inception_score(np.repeat(logits(1), 20, axis=0)) == pytest.approx((1, 0))
    # Certain, and equally often of all classes; as float32, whose exponentials underflow.
    certain = np.tile(1e4 * np.eye(6, dtype=np.float32), (10, 1))
    assert inception_score(certain) == pytest.approx((6, 0))
    # The same, sorted by class: splits see one class each.
    assert inception_score(np.repeat(1e4 * np.eye(6), 10, axis=0), splits=6) == pytest.approx((1, 0))


@pytest.mark.parametrize("splits", [0, 4])
def test_splits_without_images(splits):
    with pytest.raises(UserError, match=f"3 images in splits={splits}"):
        inception_score(logits(3), splits)
