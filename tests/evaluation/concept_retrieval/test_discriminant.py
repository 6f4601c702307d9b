import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hart_jax.evaluation.concept_retrieval.discriminant import SHRINKAGE, Discriminant
from hart_jax.evaluation.concept_retrieval.neighbours import Standardized, nearest


def labelled(seed: int, count: int = 60, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features, with a scale each, and labels that are in one of them, under noise of the others."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    hidden = random.normal(size=(count, width)) * 2
    hidden[:, 0] = labels + 0.1 * random.normal(size=count)
    mixed = hidden @ random.normal(size=(width, width)) * np.geomspace(0.01, 100, width)
    return mixed.astype(np.float32), np.array(list("abcd"))[labels]


def naive(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cosines of all pairs by the definition, x W^-1 (B + tiny W) W^-1 y, with inverses and loops."""
    x = features.astype(np.float64)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    width = x.shape[1]
    within, between = SHRINKAGE * np.eye(width), np.zeros((width, width))
    for label in set(labels):
        own = x[labels == label]
        mean = own.mean(axis=0)
        between += len(own) / len(x) * np.outer(mean, mean)
        for row in own:
            within += np.outer(row - mean, row - mean) / len(x)
    inverse = np.linalg.inv(within)
    products = x @ inverse @ (between + 1e-6 * within) @ inverse @ x.T
    lengths = np.sqrt(np.diag(products))
    return products / lengths[:, None] / lengths


@settings(max_examples=25)
@given(st.integers(0, 99), st.integers(1, 7))
def test_it_is_the_definition(seed, width):
    features, labels = labelled(seed, width=width)
    directions = Discriminant.of(features, labels).directions(features)
    np.testing.assert_allclose(directions @ directions.T, naive(features, labels), atol=1e-6)


def test_labels_are_found_under_larger_differences():
    random, own = np.random.default_rng(0), np.arange(400)
    labels = random.integers(0, 4, 400)
    features = random.normal(size=(400, 60))
    # In two of them, on a circle: similarities are of directions.
    features[:, 7:9] = np.stack([np.cos(labels * np.pi / 2), np.sin(labels * np.pi / 2)], axis=1)
    features[:, 7:9] += 0.1 * random.normal(size=(400, 2))
    # Learned from other images than those that are asked.
    space, plain = Discriminant.of(features[:200], labels[:200]), Standardized.of(features)
    for where, least, most in ((space, 0.9, 1), (plain, 0, 0.6)):
        directions = where.directions(features)
        found = nearest(directions, directions, 1, exclude=own)[:, 0]
        assert least <= np.mean(labels[found[200:]] == labels[200:]) <= most


def test_neither_order_nor_names_matter():
    features, labels = labelled(1)
    order = np.random.default_rng(0).permutation(len(labels))
    cosines = [
        directions @ directions.T
        for directions in (
            Discriminant.of(features, labels).directions(features),
            Discriminant.of(features[order], np.char.add("z", labels)[order]).directions(features),
        )
    ]
    np.testing.assert_allclose(cosines[0], cosines[1], atol=1e-9)


@pytest.mark.parametrize("labels", [np.zeros(3), np.arange(3)], ids=["one", "one each"])
def test_few_images_of_many_features(labels):
    features = np.random.default_rng(0).normal(size=(3, 20))
    directions = Discriminant.of(features, labels).directions(features)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
