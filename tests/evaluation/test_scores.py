"""Scores of sets of features: names, floors, groups, alignment with real pictures, warnings."""

import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.errors import UserError
from hart_jax.evaluation.alignment import alignment, attributes_of
from hart_jax.evaluation.metrics.discriminant import Discriminant
from hart_jax.evaluation.metrics.retrieval import nearest
from hart_jax.evaluation.networks.base import FeatureNetwork, Features
from hart_jax.evaluation.parts import Rows
from hart_jax.evaluation.pictures import About
from hart_jax.evaluation.scores import LEAST, Seen, by_group, compare, distance_name, floor, warnings_of
from hart_jax.evaluation.softened import softened

WIDTH = 6
STYLES = ("flat", "3d")


def seen(features: np.ndarray, abouts=None, logits=None, textures=None) -> Seen:
    abouts = [About(str(index)) for index in range(len(features))] if abouts is None else abouts
    return Seen(abouts, features.astype(np.float32), logits, textures)


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


def aligned(real: Seen, fake: Seen, *more, **named) -> dict:
    """Recalls of one set, in spaces learned from the real pictures alone."""
    (recalls,) = alignment(real, real, [fake], *more, **named)
    return recalls


def concepts_in_two_styles(count: int = 30) -> tuple[np.ndarray, list[About]]:
    """Textures in which concepts lie far apart and styles a little, each in an axis of its own; three of each pair."""
    random = np.random.default_rng(0)
    concept_N, style_N = np.arange(6 * count) // 6, np.arange(6 * count) % 2
    textures = np.zeros((6 * count, WIDTH))
    textures[:, 1:] = 10 * random.normal(size=(count, WIDTH - 1))[concept_N]
    textures[:, 0] = 0.5 * style_N
    textures += 0.02 * random.normal(size=textures.shape)
    abouts = [
        About(str(index), attributes={"concept": f"c{concept}", "style": STYLES[style]})
        for index, (concept, style) in enumerate(zip(concept_N, style_N, strict=True))
    ]
    return textures, abouts


def test_alignment_finds_what_captions_ask_for_between_ceiling_and_floor():
    textures, abouts = concepts_in_two_styles()
    real = seen(normal(len(textures)), abouts, textures=textures)
    assert attributes_of(real) == ["concept", "style"]
    own = np.arange(0, len(textures), 7)
    asked = [abouts[place] for place in own]
    fake = seen(normal(len(own)), asked, textures=textures[own] + 0.01 * normal(len(own), seed=1))
    scores = aligned(real, fake, own, ["concept", "style"], by="style")
    for recalls in (scores["concept"], scores["style"]):
        assert recalls["drawn"] == {"recall_at_1": 1.0, "recall_at_5": 1.0} == recalls["real"]
        assert set(recalls["drawn, by style"]) == set(STYLES)
    assert scores["concept"]["shuffled"]["recall_at_1"] < 0.3
    assert 0.2 < scores["style"]["shuffled"]["recall_at_1"] < 0.8
    # Each attribute has its own space: the right thing in the other style, and another thing in the right style.
    other_style = seen(normal(len(own)), asked, textures=textures[own ^ 1])
    scores = aligned(real, other_style, own, ["concept", "style"])
    assert scores["concept"]["drawn"]["recall_at_1"] > 0.9 > 0.1 > scores["style"]["drawn"]["recall_at_1"]
    other_concept = seen(normal(len(own)), asked, textures=textures[(own + 60) % len(textures)])
    scores = aligned(real, other_concept, own, ["concept", "style"])
    assert scores["style"]["drawn"]["recall_at_1"] > 0.9 > 0.1 > scores["concept"]["drawn"]["recall_at_1"]


def test_no_picture_is_sought_in_a_space_learned_from_its_own_concept():
    # Textures without meaning: a space learned from the very labels would find them.
    random = np.random.default_rng(0)
    abouts = [About(str(index), attributes={"concept": f"c{index // 4}"}) for index in range(80)]
    real = seen(normal(80), abouts, textures=random.normal(size=(80, 70)))
    recalls = aligned(real, real, np.arange(80), ["concept"])["concept"]
    assert recalls["drawn"]["recall_at_1"] == 1 and recalls["real"]["recall_at_1"] < 0.15
    directions = Discriminant.of(real.look_NP, np.arange(80) // 4).directions(real.look_NP)
    found = nearest(directions, directions, 1, exclude=np.arange(80))[:, 0]
    assert np.mean(found // 4 == np.arange(80) // 4) > 0.9


def test_spaces_overlook_what_softened_copies_have_lost():
    textures, abouts = concepts_in_two_styles()
    random = np.random.default_rng(1)
    # Styles lie in the first texture and, farther apart, in the last, from which softening takes them away.
    fine = 2 * np.array([[0.0], [1.0]])[np.arange(len(textures)) % 2] + 0.02 * random.normal(size=(len(textures), 1))
    sharp, blurred = np.hstack([textures, fine]), np.hstack([textures, np.zeros_like(fine)])
    features, own = normal(len(textures)), np.arange(len(textures))
    real, soft = (seen(features, abouts, textures=look) for look in (sharp, blurred))
    without, with_copies = (alignment(real, copies, [soft, real], own, ["concept", "style"]) for copies in (real, soft))
    assert without[0]["style"]["drawn"]["recall_at_1"] < 0.7
    for recalls in with_copies:
        assert recalls["style"]["drawn"]["recall_at_1"] > 0.95 < recalls["style"]["real"]["recall_at_1"]


def test_softened_copies_lose_the_finest_details_alone():
    rows = np.indices((2, 9, 24, 3))[2]
    stripes, wide, even = rows % 2 * 200, rows // 3 % 2 * 200, np.full(rows.shape, 77)
    # Of two copies the second has a pixel's sum more: another lot.
    for images in (stripes, wide, even):
        images[1, 0, 0, 0] += 1
    soft = [np.asarray(softened(jnp.asarray(images, jnp.uint8)), float) for images in (stripes, wide, even)]
    soft = [images[:, 2:, 4:-4] for images in soft]
    assert np.ptp(soft[0]) < 10 and abs(soft[0].mean() - 100) < 1
    contrasts = sorted(np.ptp(soft[1], axis=(1, 2, 3)))
    assert contrasts[0] < 60 < 120 < contrasts[1]
    np.testing.assert_array_equal(soft[2], 77)
    slow = np.broadcast_to(np.linspace(0, 255, 64)[:, None], (1, 9, 64, 3)).astype(np.uint8)
    assert np.abs(np.asarray(softened(jnp.asarray(slow)), float) - slow)[:, :, 4:-4].max() <= 3


def test_a_softened_copy_is_the_same_in_whatever_batch():
    images = np.random.default_rng(0).integers(0, 256, (6, 12, 10, 3)).astype(np.uint8)
    together = np.asarray(softened(jnp.asarray(images)))
    for index, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(softened(jnp.asarray(image[None])))[0], together[index])


def test_only_pictures_that_share_their_value_are_the_ceiling():
    textures, abouts = concepts_in_two_styles()
    alone = [About("alone", attributes={"concept": f"alone {index}", "style": STYLES[0]}) for index in range(9)]
    real = seen(normal(len(textures) + 9), [*abouts, *alone], textures=np.vstack([textures, 30 * normal(9, seed=2)]))
    own = np.arange(170, len(textures) + 9)
    fake = seen(real.features_NF[own], [real.abouts[place] for place in own], textures=real.look_NP[own])
    recalls = aligned(real, fake, own, ["concept"])["concept"]
    assert recalls["real"] == {"recall_at_1": 1.0, "recall_at_5": 1.0}
    own, fake = own[-9:], seen(normal(9), alone, textures=real.look_NP[own[-9:]])
    assert set(aligned(real, fake, own, ["concept"])["concept"]) == {"drawn", "shuffled"}


def test_alignment_of_one_value_alone():
    abouts = [About(str(index), category="cats") for index in range(12)]
    real = seen(normal(12), abouts)
    recalls = aligned(real, real, np.arange(12), ["category"])["category"]
    assert recalls["drawn"]["recall_at_1"] == recalls["real"]["recall_at_1"] == 1


def test_what_can_be_asked_of_pictures():
    plain = [About(str(index), category="cats") for index in range(3)]
    assert attributes_of(seen(normal(3), plain)) == ["category"]
    mixed = [About("0", attributes={"style": "flat", "artist": "x"}), About("1", attributes={"style": "3d"})]
    assert attributes_of(seen(normal(2), mixed)) == ["style"]
    assert attributes_of(seen(normal(2), [About("0"), About("1", category="cats")])) == []


def test_few_pictures_are_warned_of():
    (warning,) = warnings_of({"drawn": 400, "real": 20_000})
    assert warning.startswith("only 400 drawn pictures") and "10000" in warning


def test_features_that_are_not_finite_are_refused():
    features = normal(5)
    features[3, 2] = np.nan
    rows = Rows(np.arange(5), {"features": features})
    with pytest.raises(UserError, match="features of 1 of 5 images are not finite"):
        Seen.of(rows, [About(str(index)) for index in range(5)])
