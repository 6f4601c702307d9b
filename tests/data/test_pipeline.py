"""Batches: order, captions, sizes, and resuming to the same batch."""

import io
import itertools
import json
import shutil
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hart_jax.data.pipeline import load_captions, make_loader, square_image
from hart_jax.data.shards import write_shards
from hart_jax.errors import UserError


def number_of(caption: str) -> dict[str, np.ndarray]:
    """A text function: the number in the caption, and its length, which tells the variants apart."""
    digits = "".join(letter for letter in caption if letter.isdigit())
    return {"number": np.int32(digits), "length": np.int32(len(caption))}


def take(loader, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(loader, count))


def assert_same(first: list[dict], second: list[dict]):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_evaluation_is_one_pass_in_order(shards: Path):
    batches = list(make_loader(shards, image_size=16, batch_size=10, train=False, text=number_of))
    assert [len(batch["index"]) for batch in batches] == [10, 10, 3]
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index, np.arange(23))
    np.testing.assert_array_equal(np.concatenate([batch["number"] for batch in batches]), index)
    image = np.concatenate([batch["image"] for batch in batches])
    assert image.shape == (23, 16, 16, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image[:, 5, 7], np.stack([index, 2 * index, 3 * index], axis=1))
    assert {len(f"a thing {i}") for i in index} == set(np.concatenate([batch["length"] for batch in batches]))


def test_training_visits_all_once_an_epoch_in_a_new_order(shards: Path):
    loader = make_loader(shards, image_size=8, batch_size=1, seed=3, text=number_of)
    visits = [int(batch["index"][0]) for batch in take(loader, 46)]
    assert sorted(visits[:23]) == sorted(visits[23:]) == list(range(23))
    assert visits[:23] != visits[23:] != list(range(23))


def test_order_and_captions_depend_on_the_seed_alone(shards: Path):
    def make(seed: int, **options):
        return take(make_loader(shards, image_size=8, batch_size=4, seed=seed, text=number_of, flip=True, **options), 9)

    reference = make(0)
    assert_same(reference, make(0))
    assert_same(reference, make(0, cache=True))
    assert any((one["index"] != other["index"]).any() for one, other in zip(reference, make(1), strict=True))
    lengths = {(int(i), int(n)) for batch in reference for i, n in zip(batch["index"], batch["length"], strict=True)}
    assert len(lengths) > 23, "some image came with two captions"


def test_workers_give_the_same_batches(shards: Path):
    options = {"image_size": 8, "batch_size": 4, "seed": 0, "text": number_of}
    assert_same(take(make_loader(shards, **options), 3), take(make_loader(shards, **options, workers=1), 3))


def test_processes_share_each_epoch(shards: Path):
    def visits(process: int) -> list[int]:
        loader = make_loader(shards, image_size=8, batch_size=1, process_index=process, process_count=2, epochs=1)
        return [int(batch["index"][0]) for batch in loader]

    assert sorted(visits(0) + visits(1)) == list(range(23))


@settings(deadline=None, max_examples=6)
@given(before=st.integers(0, 14), cache=st.booleans())
def test_state_resumes_with_the_next_batch(shards: Path, before: int, cache: bool):
    def make():
        return make_loader(shards, image_size=8, batch_size=4, seed=5, text=number_of, flip=True, cache=cache)

    loader = make()
    take(loader, before)
    state = loader.get_state()
    expected = take(loader, 4)
    again = make()
    again.set_state(state)
    assert_same(take(again, 4), expected)


def test_orbax_saves_the_data_position(shards: Path, tmp_path: Path):
    def make():
        return make_loader(shards, image_size=8, batch_size=4, seed=5, text=number_of)

    loader = make()
    take(loader, 7)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(loader)))
        manager.wait_until_finished()
        expected = take(loader, 3)
        again = make()
        manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(again)))
    assert_same(take(again, 3), expected)


def test_captions_have_a_stable_order(shards: Path):
    captions = load_captions(shards)
    assert len(captions) == 3 * 23
    assert captions == sorted(set(captions))
    assert "thing 7, tag" in captions


def encode(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels, **options).save(file, format="PNG")
    return file.getvalue()


def test_whole_multiples_are_averaged():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    expected = pixels.reshape(4, 3, 4, 3, 3).mean((1, 3))
    np.testing.assert_allclose(square_image(encode(pixels), 4), expected, atol=0.6)


def test_the_centre_square_is_kept():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert (square_image(encode(pixels), 10) == 200).all()
    assert square_image(encode(pixels), 7).shape == (7, 7, 3)


def test_transparency_becomes_white():
    pixels = np.zeros((8, 8, 4), np.uint8)
    assert (square_image(encode(pixels), 8) == 255).all()


def test_flip_mirrors_half_but_never_left_or_right(tmp_path: Path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name in ("x", "y"):
        (tmp_path / "in" / "a" / f"{name}.png").write_bytes(encode(pixels))
    entries = {"x": {"category": "a", "prompt": "a left arrow"}, "y": {"category": "a", "prompt": "a ball"}}
    (tmp_path / "in" / "meta_data.json").write_text(json.dumps(entries))
    write_shards(tmp_path / "in", tmp_path / "out")
    mirrored: dict[int, set[bool]] = {0: set(), 1: set()}
    for batch in take(make_loader(tmp_path / "out", image_size=8, batch_size=2, flip=True), 20):
        for index, image in zip(batch["index"], batch["image"], strict=True):
            mirrored[int(index)].add(bool(image[0, 0, 0] == 0))
    assert mirrored == {0: {False}, 1: {False, True}}


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 0},
        {"batch_size": 24},
        {"process_index": 1},
        {"workers": 1, "cache": True},
        {"epochs": 0},
    ],
)
def test_bad_arguments(shards: Path, options: dict):
    with pytest.raises(UserError, match=next(iter(options))):
        make_loader(shards, **{"image_size": 8, "batch_size": 4, **options})


def test_damaged_shard_while_reading_is_a_user_error(shards: Path, tmp_path: Path):
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    shard = copy / "train-00000-of-00003.array_record"
    data = bytearray(shard.read_bytes())
    data[data.find(b"a thing 3")] ^= 255
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"train-00000-of-00003\.array_record is damaged"):
        list(make_loader(copy, image_size=8, batch_size=4, train=False))
