"""Captions read as English and start with the style."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hart_jax.data.emoji.captions import MAX_CAPTIONS, STYLE_PHRASES, caption_variants, plain_names, with_article


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("red apple", "a red apple"),
        ("apple", "an apple"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("eyes", "eyes"),
        ("house with garden", "a house with garden"),
        ("pair of shoes", "a pair of shoes"),
        ("grapes on a plate", "grapes on a plate"),
        ("cactus", "a cactus"),
        ("the flag of france", "the flag of france"),
        ("cooked rice", "cooked rice"),
        ("bowling", "bowling"),
        ("ring", "a ring"),
        ("x-ray", "an x-ray"),
    ],
)
def test_article(phrase: str, expected: str):
    assert with_article(phrase) == expected


@pytest.mark.parametrize(
    ("label", "face", "expected"),
    [
        ("dog face", True, ["dog"]),
        ("dog face", False, []),
        ("red apple", False, ["apple"]),
        ("hot dog", False, []),
        ("polar bear", False, ["bear"]),
        ("grinning face", False, []),
        ("house", False, []),
    ],
)
def test_plain_names(label: str, face: bool, expected: list[str]):
    assert plain_names(label, face_of_thing=face) == expected


def test_variants_of_an_emoji():
    captions = caption_variants("fluentflat", "dog face", ["animal", "dog", "pet", "puppy"], ["dog"])
    assert captions == [
        "a flat icon of a dog face",
        "a flat icon of a dog face, animal, pet",
        "a flat icon of a dog",
        "a flat icon of a dog face, puppy",
        "a flat icon of a dog, animal",
    ]


def test_a_label_alone_gives_its_caption_first():
    assert caption_variants("noto", "Red Heart")[0] == "a cartoon of a red heart"


texts = st.text("abcdefgh XY'-,", min_size=1, max_size=20).filter(lambda text: text.strip(" ,'-"))


@given(st.sampled_from(sorted(STYLE_PHRASES)), texts, st.lists(texts, max_size=6))
def test_variants_are_distinct_few_and_name_the_style(style: str, label: str, tags: list[str]):
    captions = caption_variants(style, label, tags)
    assert 1 <= len(captions) <= MAX_CAPTIONS
    assert len(set(captions)) == len(captions)
    assert all(caption.startswith(STYLE_PHRASES[style] + " ") for caption in captions)
    assert captions == caption_variants(style, label, tags)
