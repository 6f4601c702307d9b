import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hart_jax.errors import UserError
from hart_jax.evaluation.concept_retrieval.neighbours import Standardized, nearest, recall_at, unit


def features(count: int, seed: int) -> np.ndarray:
    """Some of them twice, and one feature the same in all."""
    rng = np.random.default_rng(seed)
    made = 5 + rng.normal(size=(count, 5)) * np.array([1, 10, 0.1, 3, 0])
    made[count // 2 :] = made[: count - count // 2]
    return made.astype(np.float32)


def naive(queries: np.ndarray, gallery: np.ndarray, count: int, exclude: np.ndarray) -> list[list[int]]:
    gallery = gallery.astype(np.float64)
    mean, deviation = gallery.mean(axis=0), gallery.std(axis=0)
    deviation[deviation < 1e-9] = 1
    found = []
    for query, own in zip((queries - mean) / deviation, exclude, strict=True):
        scored = []
        for index, image in enumerate((gallery - mean) / deviation):
            cosine = query @ image / np.sqrt((query @ query) * (image @ image))
            if index != own:
                scored.append((-round(cosine, 9), index))
        found.append([index for _, index in sorted(scored)[:count]])
    return found


@settings(max_examples=40)
@given(st.integers(4, 15), st.integers(1, 9), st.integers(1, 3), st.integers(1, 10), st.integers(0, 99))
def test_it_is_the_definition_with_ties(gallery_count, query_count, count, block, seed):
    gallery, queries = features(gallery_count, seed), features(query_count, seed + 100)
    exclude = np.random.default_rng(seed).integers(-1, gallery_count, query_count)
    space = Standardized.of(gallery)
    directions = space.directions(queries), space.directions(gallery)
    found = nearest(*directions, count, exclude=exclude, block=block)
    assert found.tolist() == naive(queries, gallery, count, exclude)
    assert nearest(*directions, count).tolist() == naive(queries, gallery, count, np.full(query_count, -1))


def test_an_image_finds_itself_unless_that_is_left_out():
    gallery = unit(np.random.default_rng(0).normal(size=(6, 4)))
    own = np.arange(6)
    np.testing.assert_array_equal(nearest(gallery, gallery, 1)[:, 0], own)
    others = nearest(gallery, gallery, 5, exclude=own)
    np.testing.assert_array_equal(np.sort(np.c_[others, own], axis=1), np.tile(own, (6, 1)))


def test_a_query_is_scaled_as_the_gallery_is():
    gallery = np.array([[0.0, 0.0], [1.0, 100.0], [2.0, 0.0], [1.0, -100.0]])
    space = Standardized.of(gallery)
    # Three deviations of the first feature, a fraction of one of the second.
    query = space.directions(np.array([[4.0, 20.0]]))
    assert nearest(query, space.directions(gallery), 1).tolist() == [[2]]
    np.testing.assert_allclose(space.mean_F, [1, 0])
    np.testing.assert_allclose(space.deviation_F, [np.sqrt(0.5), np.sqrt(5000)])


def test_recall():
    labels = np.array(["cat", "dog", "cat", "cow"])
    neighbours = np.array([[0, 1, 3], [1, 2, 0], [3, 1, 2], [2, 0, 1]])
    wanted = np.array(["cat", "cow", "cat", "dog"])
    assert recall_at(neighbours, labels, wanted, ks=(1, 2, 3)) == {1: 0.25, 2: 0.25, 3: 0.75}
    assert recall_at(np.zeros((1, 5), int), np.array([3]), np.array([3])) == {1: 1.0, 5: 1.0}


def test_more_neighbours_than_images():
    gallery = unit(features(4, 0))
    with pytest.raises(UserError, match="count=5 nearest images of a gallery of 4"):
        nearest(gallery, gallery)
    with pytest.raises(UserError, match="1 to 3"):
        nearest(gallery, gallery, 4, exclude=np.arange(4))
    with pytest.raises(ValueError, match="k up to K"):
        recall_at(np.zeros((2, 3), int), np.zeros(4), np.zeros(2), ks=(1, 5))
    with pytest.raises(ValueError, match="needs queries"):
        recall_at(np.zeros((0, 3), int), np.zeros(4), np.zeros(0), ks=(1,))
