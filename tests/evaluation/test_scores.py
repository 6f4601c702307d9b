"""Scores of sets of features: names, real against real, groups, warnings."""

import numpy as np
import pytest

from hart_jax.errors import UserError
from hart_jax.evaluation.feature_cache import FeatureRows
from hart_jax.evaluation.images import ImageInfo
from hart_jax.evaluation.networks.base import FeatureNetwork, Features
from hart_jax.evaluation.scores import LEAST, FeatureSet, by_group, compare, distance_name, real_vs_real, warnings_of
from tests.evaluation.feature_sets import STYLES, WIDTH, feature_set, normal


def network(standard: bool) -> FeatureNetwork:
    return FeatureNetwork("Net", standard, "0" * 16, WIDTH, None, lambda params, images: Features(images))


def test_only_the_standard_network_gives_an_fid():
    assert distance_name(network(True)) == "FID"
    assert distance_name(network(False)) == "Frechet distance, Net"


def test_a_set_is_like_itself_and_unlike_what_is_far():
    real, near, far = (
        feature_set(normal(300)),
        feature_set(normal(300, seed=1)),
        feature_set(normal(300, seed=2, mean=3)),
    )
    same, close, wide = (compare(real, other) for other in (real, near, far))
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert (same["precision"], same["recall"]) == (1, 1)
    assert same["frechet_distance"] < close["frechet_distance"] < wide["frechet_distance"]
    assert close["kid_x1000"] < wide["kid_x1000"] and close["precision"] > 0.7 > 0.1 > wide["precision"]
    assert wide["frechet_distance"] == pytest.approx(WIDTH * 9, rel=0.15)
    assert "inception_score" not in same and same["kid_subset"] == 300
    sure = np.eye(4)[np.arange(320) % 4] * 100
    assert compare(real, feature_set(normal(320), logits=sure))["inception_score"] == pytest.approx(4, rel=1e-3)


def test_real_images_stand_against_as_many_as_there_are_samples():
    real = feature_set(normal(400))
    few, half = real_vs_real(real, 50), real_vs_real(real, 10_000)
    assert (few["pictures"], half["pictures"]) == (50, 200)
    assert few["frechet_distance"] > half["frechet_distance"] > 0
    assert real_vs_real(real, 50) == few != real_vs_real(real, 50, seed=1)


def test_groups_are_compared_with_their_own():
    infos = [ImageInfo(str(index), attributes={"style": STYLES[index % 2]}) for index in range(100)]
    shift = np.array([[0.0], [5.0]])[np.arange(100) % 2]
    real, fake = feature_set(normal(100) + shift, infos), feature_set(normal(100, seed=1) + shift, infos)
    groups = by_group(real, fake, "style")
    assert set(groups) == set(STYLES) and all(group["pictures"] == 50 for group in groups.values())
    assert max(group["frechet_distance"] for group in groups.values()) < 3
    moved = [ImageInfo(info.name, attributes={"style": STYLES[index // 50]}) for index, info in enumerate(infos)]
    assert (
        min(
            group["frechet_distance"]
            for group in by_group(real, feature_set(fake.features_NF, moved), "style").values()
        )
        > 5
    )
    few = feature_set(fake.features_NF[: 2 * LEAST - 1], infos[: 2 * LEAST - 1])
    assert set(by_group(real, few, "style")) == {"flat"}
    assert by_group(real, fake, "colour") == {}


def test_few_images_are_warned_of():
    (warning,) = warnings_of({"sampled": 400, "real": 20_000})
    assert warning.startswith("only 400 sampled images") and "10000" in warning


def test_features_that_are_not_finite_are_refused():
    features = normal(5)
    features[3, 2] = np.nan
    rows = FeatureRows(np.arange(5), {"features": features})
    with pytest.raises(UserError, match="features of 1 of 5 images are not finite"):
        FeatureSet.of(rows, [ImageInfo(str(index)) for index in range(5)])
