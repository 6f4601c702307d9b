"""Scores of sets of features: names, floors, groups, alignment with real pictures, warnings."""

import numpy as np
import pytest

from hart_jax.evaluation.alignment import alignment, attributes_of
from hart_jax.evaluation.networks.base import FeatureNetwork, Features
from hart_jax.evaluation.pictures import About
from hart_jax.evaluation.scores import LEAST, Seen, by_group, compare, distance_name, floor, moments_of, warnings_of

WIDTH = 6
STYLES = ("flat", "3d")


def seen(features: np.ndarray, abouts=None, logits=None) -> Seen:
    abouts = [About(str(index)) for index in range(len(features))] if abouts is None else abouts
    return Seen(abouts, features.astype(np.float32), logits, moments_of(features))


def normal(count: int, seed: int = 0, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (count, WIDTH))


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


def test_alignment_finds_what_captions_ask_for_between_ceiling_and_floor():
    concepts = np.arange(40) // 2
    abouts = [
        About(str(index), attributes={"concept": f"c{concepts[index]}", "style": STYLES[index % 2]})
        for index in range(40)
    ]
    # A concept's two pictures lie together; styles differ a little.
    places = 10 * np.random.default_rng(0).normal(size=(20, WIDTH))[concepts] + np.arange(40)[:, None] % 2
    real = seen(places, abouts)
    assert attributes_of(real) == ["concept", "style"]
    own = np.arange(0, 40, 3)
    fake = seen(places[own] + 0.01 * normal(len(own)), [abouts[place] for place in own])
    scores = alignment(real, fake, own, ["concept", "style"], by="style")
    concept, style = scores["concept"], scores["style"]
    assert concept["drawn"] == {"recall_at_1": 1.0, "recall_at_5": 1.0} == style["drawn"]
    # Without itself a real picture finds the other of its concept, in the other style.
    assert concept["real"]["recall_at_1"] > 0.9 and style["real"]["recall_at_1"] < 0.2
    assert concept["shuffled"]["recall_at_1"] < 0.3 and 0.2 < style["shuffled"]["recall_at_1"] < 0.8
    assert set(concept["drawn, by style"]) == set(STYLES)
    assert scores["style, other concept"]["drawn"]["recall_at_1"] < 0.9
    # No other style has more pictures of a concept than one.
    assert scores["concept, other style"]["drawn"]["recall_at_1"] > 0.9
    wrong = seen(places[own[::-1]], [abouts[place] for place in own])
    assert alignment(real, wrong, own, ["concept"])["concept"]["drawn"]["recall_at_1"] < 0.3


def test_what_can_be_asked_of_pictures():
    plain = [About(str(index), category="cats") for index in range(3)]
    assert attributes_of(seen(normal(3), plain)) == ["category"]
    mixed = [About("0", attributes={"style": "flat", "artist": "x"}), About("1", attributes={"style": "3d"})]
    assert attributes_of(seen(normal(2), mixed)) == ["style"]
    assert attributes_of(seen(normal(2), [About("0"), About("1", category="cats")])) == []


def test_few_pictures_are_warned_of():
    (warning,) = warnings_of({"drawn": 400, "real": 20_000})
    assert warning.startswith("only 400 drawn pictures") and "10000" in warning
