import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hart_jax.errors import UserError
from hart_jax.evaluation.metrics.precision_recall import precision_recall


def naive(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    """Of points with whole coordinates, whose distances are exact."""

    def distance(x, y) -> int:
        return sum((int(p) - int(q)) ** 2 for p, q in zip(x, y, strict=True))

    def share(points, centres) -> float:
        radii = [sorted(distance(x, y) for j, y in enumerate(centres) if j != i)[k - 1] for i, x in enumerate(centres)]
        inside = [any(distance(x, c) <= radius for c, radius in zip(centres, radii, strict=True)) for x in points]
        return sum(inside) / len(inside)

    return share(fake, real), share(real, fake)


# So few whole numbers that many points and distances are the same.
points = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=4, max_size=12).map(np.array)


@settings(max_examples=80)
@given(points, points, st.integers(1, 3), st.integers(1, 13), st.booleans())
def test_it_is_the_definition_with_ties(real, fake, k, block, moved):
    # Moved and scaled, distances that were equal are equal to rounding only.
    ours = [(0.1 * part + 3.7).astype(np.float64) if moved else part for part in (real, fake)]
    assert precision_recall(*ours, k=k, block=block) == naive(real, fake, k)


@given(points, st.integers(0, 9))
def test_a_set_has_all_of_itself_in_any_order(real, seed):
    shuffled = np.random.default_rng(seed).permutation(real)
    assert precision_recall(real, shuffled) == (1, 1)


def test_sets_far_apart_share_nothing():
    near = np.random.default_rng(0).normal(size=(10, 3))
    assert precision_recall(near, near + 100) == (0, 0)


def test_too_few_samples_of_a_mode_cost_recall_and_not_precision():
    rng = np.random.default_rng(0)
    modes = [rng.normal(size=(40, 2)) + centre for centre in (0, 50)]
    precision, recall = precision_recall(np.concatenate(modes), rng.normal(size=(40, 2)))
    assert precision > 0.8
    assert 0.3 < recall <= 0.5


@pytest.mark.parametrize(("k", "named"), [(0, "k=0 of 5 real"), (3, "k=3 of 3 fake"), (5, "k=5 of 5 real")])
def test_a_k_without_so_many_neighbours(k, named):
    with pytest.raises(UserError, match=named):
        precision_recall(np.zeros((5, 2)), np.zeros((3, 2)), k=k)


def test_features_of_two_networks():
    with pytest.raises(ValueError, match="2 and 3 features"):
        precision_recall(np.zeros((5, 2)), np.zeros((5, 3)))
