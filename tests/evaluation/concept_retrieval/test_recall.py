import numpy as np

from hart_jax.evaluation.concept_retrieval.discriminant import Discriminant
from hart_jax.evaluation.concept_retrieval.neighbours import nearest
from hart_jax.evaluation.concept_retrieval.recall import attributes_of, concept_recall
from hart_jax.evaluation.images import ImageInfo
from hart_jax.evaluation.scores import FeatureSet
from tests.evaluation.feature_sets import STYLES, WIDTH, feature_set, normal


def aligned(real: FeatureSet, fake: FeatureSet, *more, **named) -> dict:
    """Recalls of one set, in spaces learned from the real images alone."""
    (recalls,) = concept_recall(real, real, [fake], *more, **named)
    return recalls


def concepts_in_two_styles(count: int = 30) -> tuple[np.ndarray, list[ImageInfo]]:
    """Textures in which concepts lie far apart and styles a little, each in an axis of its own; three of each pair."""
    random = np.random.default_rng(0)
    concept_N, style_N = np.arange(6 * count) // 6, np.arange(6 * count) % 2
    textures = np.zeros((6 * count, WIDTH))
    textures[:, 1:] = 10 * random.normal(size=(count, WIDTH - 1))[concept_N]
    textures[:, 0] = 0.5 * style_N
    textures += 0.02 * random.normal(size=textures.shape)
    infos = [
        ImageInfo(str(index), attributes={"concept": f"c{concept}", "style": STYLES[style]})
        for index, (concept, style) in enumerate(zip(concept_N, style_N, strict=True))
    ]
    return textures, infos


def test_it_finds_what_captions_ask_for_between_ceiling_and_lower_bound():
    textures, infos = concepts_in_two_styles()
    real = feature_set(normal(len(textures)), infos, textures=textures)
    assert attributes_of(real) == ["concept", "style"]
    own = np.arange(0, len(textures), 7)
    asked = [infos[place] for place in own]
    fake = feature_set(normal(len(own)), asked, textures=textures[own] + 0.01 * normal(len(own), seed=1))
    scores = aligned(real, fake, own, ["concept", "style"], by="style")
    for recalls in (scores["concept"], scores["style"]):
        assert recalls["drawn"] == {"recall_at_1": 1.0, "recall_at_5": 1.0} == recalls["real"]
        assert set(recalls["drawn, by style"]) == set(STYLES)
    assert scores["concept"]["shuffled"]["recall_at_1"] < 0.3
    assert 0.2 < scores["style"]["shuffled"]["recall_at_1"] < 0.8
    # Each attribute has its own space: the right thing in the other style, and another thing in the right style.
    other_style = feature_set(normal(len(own)), asked, textures=textures[own ^ 1])
    scores = aligned(real, other_style, own, ["concept", "style"])
    assert scores["concept"]["drawn"]["recall_at_1"] > 0.9 > 0.1 > scores["style"]["drawn"]["recall_at_1"]
    other_concept = feature_set(normal(len(own)), asked, textures=textures[(own + 60) % len(textures)])
    scores = aligned(real, other_concept, own, ["concept", "style"])
    assert scores["style"]["drawn"]["recall_at_1"] > 0.9 > 0.1 > scores["concept"]["drawn"]["recall_at_1"]


def test_no_image_is_sought_in_a_space_learned_from_its_own_concept():
    # Textures without meaning: a space learned from the very labels would find them.
    random = np.random.default_rng(0)
    infos = [ImageInfo(str(index), attributes={"concept": f"c{index // 4}"}) for index in range(80)]
    real = feature_set(normal(80), infos, textures=random.normal(size=(80, 70)))
    recalls = aligned(real, real, np.arange(80), ["concept"])["concept"]
    assert recalls["drawn"]["recall_at_1"] == 1 and recalls["real"]["recall_at_1"] < 0.15
    directions = Discriminant.of(real.style_features_NP, np.arange(80) // 4).directions(real.style_features_NP)
    found = nearest(directions, directions, 1, exclude=np.arange(80))[:, 0]
    assert np.mean(found // 4 == np.arange(80) // 4) > 0.9


def test_spaces_overlook_what_blurred_copies_have_lost():
    textures, infos = concepts_in_two_styles()
    random = np.random.default_rng(1)
    # Styles lie in the first texture and, farther apart, in the last, from which blurring takes them away.
    fine = 2 * np.array([[0.0], [1.0]])[np.arange(len(textures)) % 2] + 0.02 * random.normal(size=(len(textures), 1))
    sharp, blurred = np.hstack([textures, fine]), np.hstack([textures, np.zeros_like(fine)])
    features, own = normal(len(textures)), np.arange(len(textures))
    real, soft = (feature_set(features, infos, textures=look) for look in (sharp, blurred))
    without, with_copies = (
        concept_recall(real, copies, [soft, real], own, ["concept", "style"]) for copies in (real, soft)
    )
    assert without[0]["style"]["drawn"]["recall_at_1"] < 0.7
    for recalls in with_copies:
        assert recalls["style"]["drawn"]["recall_at_1"] > 0.95 < recalls["style"]["real"]["recall_at_1"]


def test_only_images_that_share_their_value_are_the_ceiling():
    textures, infos = concepts_in_two_styles()
    alone = [ImageInfo("alone", attributes={"concept": f"alone {index}", "style": STYLES[0]}) for index in range(9)]
    real = feature_set(
        normal(len(textures) + 9), [*infos, *alone], textures=np.vstack([textures, 30 * normal(9, seed=2)])
    )
    own = np.arange(170, len(textures) + 9)
    fake = feature_set(
        real.features_NF[own], [real.infos[place] for place in own], textures=real.style_features_NP[own]
    )
    recalls = aligned(real, fake, own, ["concept"])["concept"]
    assert recalls["real"] == {"recall_at_1": 1.0, "recall_at_5": 1.0}
    own, fake = own[-9:], feature_set(normal(9), alone, textures=real.style_features_NP[own[-9:]])
    assert set(aligned(real, fake, own, ["concept"])["concept"]) == {"drawn", "shuffled"}


def test_one_value_alone():
    infos = [ImageInfo(str(index), category="cats") for index in range(12)]
    real = feature_set(normal(12), infos)
    recalls = aligned(real, real, np.arange(12), ["category"])["category"]
    assert recalls["drawn"]["recall_at_1"] == recalls["real"]["recall_at_1"] == 1


def test_what_can_be_asked_of_images():
    plain = [ImageInfo(str(index), category="cats") for index in range(3)]
    assert attributes_of(feature_set(normal(3), plain)) == ["category"]
    mixed = [ImageInfo("0", attributes={"style": "flat", "artist": "x"}), ImageInfo("1", attributes={"style": "3d"})]
    assert attributes_of(feature_set(normal(2), mixed)) == ["style"]
    assert attributes_of(feature_set(normal(2), [ImageInfo("0"), ImageInfo("1", category="cats")])) == []
