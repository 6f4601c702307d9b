"""Sizes of images as a user gives them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hart_jax.config import TokenizerConfig
from hart_jax.config.sizes import image_shape_of, parse_ratio, parse_size, shape_of_ratio, size_text
from hart_jax.errors import UserError

# Of the released model at 1024 px, and of the bundled one.
LARGE = TokenizerConfig(image_size=1024, patch_nums=(1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64))
SMALL = TokenizerConfig(image_size=64, patch_nums=(1, 2, 3, 4, 6, 8), channels=32, channel_multipliers=(1, 1, 2, 4))


def test_width_comes_first():
    assert parse_size("768x1152") == (1152, 768)
    assert parse_ratio("2:3") == (3, 2)
    assert size_text((1152, 768)) == "768x1152"
    for size in ("768x1152", (768, 1152), np.array([768, 1152])):
        assert image_shape_of(size, LARGE) == (1152, 768)
    assert image_shape_of(None, LARGE) == (1024, 1024)


def test_ratios_that_people_ask_for():
    found = {ratio: size_text(image_shape_of(ratio, LARGE)) for ratio in ("1:1", "2:3", "3:2", "9:16", "16:9", "4:1")}
    assert found == {
        "1:1": "1024x1024",
        "2:3": "832x1248",
        "3:2": "1248x832",
        "9:16": "768x1360",
        "16:9": "1360x768",
        "4:1": "2048x512",
    }
    assert size_text(image_shape_of("2:3", SMALL)) == "56x80"


sides = st.integers(1, 400)


@given(sides, sides, st.integers(3, 80), st.integers(3, 80))
def test_a_ratio_keeps_pixels_and_shape_as_nearly_as_whole_tokens_allow(width, height, rows, columns):
    if max(width, height) > 4 * min(width, height) or max(rows, columns) > 4 * min(rows, columns):
        return
    own = TokenizerConfig(image_size=(16 * rows, 16 * columns), patch_nums=(1, (rows, columns)))
    shape = shape_of_ratio((height, width), own)
    tall, wide = (side / 16 for side in shape)
    assert tall == int(tall) and wide == int(wide) and max(tall, wide) <= 4 * min(tall, wide)
    exact = math.sqrt(rows * columns * height / width), math.sqrt(rows * columns * width / height)
    # The shorter side may have been rounded up, to stay within 4:1.
    assert abs(max(tall, wide) - max(exact)) <= 0.5 + 1e-9 and abs(min(tall, wide) - min(exact)) < 1
    assert shape_of_ratio((width, height), own) == shape[::-1]
    assert shape_of_ratio((7 * rows, 7 * columns), own) == own.image_shape


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("770x1152", "size 770x1152: height and width must be multiples of 16 px; give 768x1152 or 784x1152"),
        ("1150x770", "size 1150x770: height and width must be multiples of 16 px; give 1152x768 or 1136x768"),
        ("5x5", "size 5x5: height and width must be multiples of 16 px; give 224x224"),
        ("128x256", "size 128x256: too small for the 14 scales of the model; give 160x304 or more"),
        ("512x2064", "size 512x2064: at most 4:1 is possible, high or wide"),
        ("1:5", "ratio 1:5: at most 4:1 is possible, high or wide"),
        ("2:3:4", "ratio '2:3:4': write it as width:height in whole numbers, like 2:3"),
        ("1.5:1", "ratio '1.5:1': write it as"),
        ("0:1", "ratio '0:1': write it as"),
        ("768", "size '768': write WIDTHxHEIGHT in pixels, like 768x1152, or a ratio like 2:3"),
        ("768 x 1152", "size '768 x 1152': write"),
        ("\u0667\u0668x16", "size '\u0667\u0668x16': write"),
        ("", "size '': write"),
        (768, 'size 768: give "768x1152", "2:3", or width and height in pixels, (768, 1152)'),
        ((768,), "size (768,): give"),
        ((0, 768), "size (0, 768): give"),
        ((768.0, 768.0), "size (768.0, 768.0): give"),
    ],
)
def test_what_is_no_size_of_the_model_is_named(size, message):
    with pytest.raises(UserError) as raised:
        image_shape_of(size, LARGE)
    assert str(raised.value).startswith(message)


@given(st.integers(1, 12), st.integers(1, 12))
def test_what_is_recommended_works(rows, columns):
    try:
        image_shape_of((8 * columns + 3, 8 * rows), SMALL)
    except UserError as error:
        if "; give " in str(error):
            for size in str(error).rpartition("give ")[2].split(" or "):
                assert size == "more" or image_shape_of(size, SMALL)
