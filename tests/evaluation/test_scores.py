"""Scores of sets of features: names, real against real, groups, warnings."""

import numpy as np
import pytest

from hart_jax.errors import UserError
from hart_jax.evaluation.networks.base import FeatureNetwork, Features
from hart_jax.evaluation.parts import Rows
from hart_jax.evaluation.pictures import About
from hart_jax.evaluation.scores import LEAST, Seen, by_group, compare, distance_name, floor, warnings_of
from tests.evaluation.feature_sets import STYLES, WIDTH, normal, seen


def network(standard: bool) -> FeatureNetwork:
    return FeatureNetwork("Net", standard, "0" * 16, WIDTH, None, lambda params, images: Features(images))


def test_only_the_standard_network_gives_an_fid():
    assert distance_name(network(True)) == "FID"
    assert distance_name(network(False)) == "Frechet distance, Net"


def test_a_set_is_like_itself_and_unlike_what_is_far():
    real, near, far = seen(normal(300)), seen(normal(300, seed=1)), seen(normal(300, seed=2, mean=3))
    same, close, wide = (compare(real, other) for other in (real, near, far))
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert (same["precision"], same["recall"]) == (1, 1)
    assert same["frechet_distance"] < close["frechet_distance"] < wide["frechet_distance"]
    assert close["kid_x1000"] < wide["kid_x1000"] and close["precision"] > 0.7 > 0.1 > wide["precision"]
    assert wide["frechet_distance"] == pytest.approx(WIDTH * 9, rel=0.15)
    assert "inception_score" not in same and same["kid_subset"] == 300
    sure = np.eye(4)[np.arange(320) % 4] * 100
    assert compare(real, seen(normal(320), logits=sure))["inception_score"] == pytest.approx(4, rel=1e-3)


def test_the_floor_is_of_as_many_pictures_as_are_drawn():
    real = seen(normal(400))
    few, half = floor(real, 50), floor(real, 10_000)
    assert (few["pictures"], half["pictures"]) == (50, 200)
    assert few["frechet_distance"] > half["frechet_distance"] > 0
    assert floor(real, 50) == few != floor(real, 50, seed=1)


def test_groups_are_compared_with_their_own():
    abouts = [About(str(index), attributes={"style": STYLES[index % 2]}) for index in range(100)]
    shift = np.array([[0.0], [5.0]])[np.arange(100) % 2]
    real, fake = seen(normal(100) + shift, abouts), seen(normal(100, seed=1) + shift, abouts)
    groups = by_group(real, fake, "style")
    assert set(groups) == set(STYLES) and all(group["pictures"] == 50 for group in groups.values())
    assert max(group["frechet_distance"] for group in groups.values()) < 3
    moved = [About(about.name, attributes={"style": STYLES[index // 50]}) for index, about in enumerate(abouts)]
    assert (
        min(group["frechet_distance"] for group in by_group(real, seen(fake.features_NF, moved), "style").values()) > 5
    )
    few = seen(fake.features_NF[: 2 * LEAST - 1], abouts[: 2 * LEAST - 1])
    assert set(by_group(real, few, "style")) == {"flat"}
    assert by_group(real, fake, "colour") == {}


def test_few_pictures_are_warned_of():
    (warning,) = warnings_of({"drawn": 400, "real": 20_000})
    assert warning.startswith("only 400 drawn pictures") and "10000" in warning


def test_features_that_are_not_finite_are_refused():
    features = normal(5)
    features[3, 2] = np.nan
    rows = Rows(np.arange(5), {"features": features})
    with pytest.raises(UserError, match="features of 1 of 5 images are not finite"):
        Seen.of(rows, [About(str(index)) for index in range(5)])
