"""Value ranges, grids and PNG files."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hart_jax.errors import UserError
from hart_jax.io.images import grid, read_png_metadata, save_png, to_uint8


def test_to_uint8_ends_middle_and_beyond():
    values = np.array([-1.0, 1.0, 0.0, -7.0, 7.0, np.nan, np.inf, -np.inf])
    assert to_uint8(values).tolist() == [0, 255, 128, 0, 255, 0, 255, 0]


def test_to_uint8_inverts_the_usual_scaling():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(levels / 127.5 - 1.0), levels)


@given(count=st.integers(1, 9), columns=st.integers(1, 5), padding=st.integers(0, 3))
def test_grid_places_every_image_where_it_belongs(count, columns, padding):
    images = np.random.default_rng(count).integers(0, 255, (count, 4, 6, 3), dtype=np.uint8)
    canvas = grid(images, columns, padding)
    columns = min(columns, count)
    for index in range(count):
        top = padding + index // columns * (4 + padding)
        left = padding + index % columns * (6 + padding)
        np.testing.assert_array_equal(canvas[top : top + 4, left : left + 6], images[index])
    rows = -(-count // columns)
    assert canvas.shape == (padding + rows * (4 + padding), padding + columns * (6 + padding), 3)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=7), st.integers(1, 4))
def test_images_of_other_shapes_lie_in_the_middle_of_equal_cells(shapes, columns):
    images = [np.full((*shape, 3), number, np.uint8) for number, shape in enumerate(shapes)]
    canvas = grid(images, columns, padding=1)
    height, width = (max(sides) for sides in zip(*shapes, strict=True))
    columns = min(columns, len(images))
    assert canvas.shape == (1 + -(-len(images) // columns) * (height + 1), 1 + columns * (width + 1), 3)
    for number, (tall, wide) in enumerate(shapes):
        row, column = divmod(number, columns)
        top, left = 1 + row * (height + 1), 1 + column * (width + 1)
        cell = canvas[top : top + height, left : left + width]
        above, before = (height - tall) // 2, (width - wide) // 2
        expected = np.full_like(cell, 255)
        expected[above : above + tall, before : before + wide] = number
        np.testing.assert_array_equal(cell, expected)


@given(st.text(max_size=200))
@settings(max_examples=30)
def test_captions_are_written_below_and_leave_the_images_alone(caption):
    images = np.zeros((2, 30, 40, 3), np.uint8)
    canvas = grid(images, 2, padding=2, captions=["apple", caption])
    assert not canvas[2:32, 2:42].any() and not canvas[2:32, 44:84].any()
    assert canvas.shape[1] == 2 + 2 * 42
    assert (canvas[34:, 2:42] < 128).any()
    assert canvas.shape[0] < 34 + 6 * 20


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)],
    ],
)
def test_grid_refuses_other_arrays(images):
    with pytest.raises(ValueError, match="uint8"):
        grid(images, 2)


def test_grid_refuses_a_wrong_number_of_captions():
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        grid(np.zeros((2, 4, 4, 3), np.uint8), 2, captions=["one"])


def test_png_round_trip_with_metadata(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    metadata = {"prompt": 'ein Häuschen 🏠 "it\'s"\nsecond line', "seed": "3", "empty": ""}
    path = tmp_path / "new" / "a.png"
    save_png(path, image, metadata)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    assert read_png_metadata(path) == metadata
    assert os.listdir(path.parent) == ["a.png"]


def test_png_is_not_overwritten_unless_asked(tmp_path):
    path = tmp_path / "a.png"
    save_png(path, np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.png exists already; give another name"):
        save_png(path, np.ones((4, 4, 3), np.uint8))
    assert not np.asarray(Image.open(path)).any()
    save_png(path, np.ones((4, 4, 3), np.uint8), overwrite=True)
    assert np.asarray(Image.open(path)).all()


def test_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.complex64))
    assert os.listdir(tmp_path) == []


def test_wrong_paths(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="is not a folder"):
        save_png(tmp_path / "file" / "a.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="is a folder"):
        save_png(tmp_path, np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="not a readable PNG"):
        read_png_metadata(tmp_path / "file")
    with pytest.raises(UserError, match="does not exist"):
        read_png_metadata(tmp_path / "none.png")
