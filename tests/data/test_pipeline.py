"""Batches: order, captions, sizes, and resuming to the same batch."""

import asyncio
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
from imagecodecs import png_encode
from PIL import Image

from hart_jax.data.batches import Batches
from hart_jax.data.image_files import cropped_image
from hart_jax.data.pipeline import load_captions, make_loader, some_captions
from hart_jax.data.shards import RecordSource, write_shards
from hart_jax.errors import UserError
from tests.data.conftest import make_folder, without_captions_files


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


def test_tokens_stand_in_for_images_in_the_same_order(shards: Path):
    options = {"image_size": 8, "batch_size": 4, "seed": 3, "text": number_of}
    images = take(make_loader(shards, **options), 8)
    tokens = take(make_loader(shards, **options, tokens=lambda index: {"tokens": np.arange(3) + index}), 8)
    for with_image, with_tokens in zip(images, tokens, strict=True):
        np.testing.assert_array_equal(with_tokens.pop("tokens"), with_image["index"][:, None] + np.arange(3))
        del with_image["image"]
        assert_same([with_image], [with_tokens])


def test_tokens_of_mirrored_images_are_refused(shards: Path):
    with pytest.raises(UserError, match=r"set data\.flip=False"):
        make_loader(shards, image_size=8, batch_size=4, flip=True, tokens=lambda index: {})


def test_workers_give_the_same_batches(shards: Path):
    options = {"image_size": 8, "batch_size": 4, "seed": 0, "text": number_of}
    assert_same(take(make_loader(shards, **options), 3), take(make_loader(shards, **options, workers=1), 3))


def indices(batches: list[dict[str, np.ndarray]]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


def all_processes(shards: Path, process_count: int, state: dict | None = None):
    """A function that gives the next so many batches of all processes, put together, and their common state."""
    options = {"image_size": 8, "batch_size": 4, "seed": 5, "text": number_of, "flip": True}
    loaders = [make_loader(shards, **options, rows=rows) for rows in np.split(np.arange(4), process_count)]
    for loader in loaders:
        if state is not None:
            loader.set_state(state)

    def take_all(count: int) -> tuple[list[dict[str, np.ndarray]], dict]:
        shares = [take(loader, count) for loader in loaders]
        states = [loader.get_state() for loader in loaders]
        assert states == [states[0]] * process_count
        whole = [
            {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            for parts in zip(*shares, strict=True)
        ]
        return whole, states[0]

    return take_all


@pytest.mark.parametrize("process_count", [2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(shards: Path, process_count: int):
    one, _ = all_processes(shards, 1)(13)
    several, _ = all_processes(shards, process_count)(13)
    assert_same(one, several)


def test_resuming_with_other_numbers_of_processes_loses_and_repeats_nothing(shards: Path):
    reference, _ = all_processes(shards, 1)(23)
    first, state = all_processes(shards, 2)(3)
    second, state = all_processes(shards, 1, state)(5)
    third, state = all_processes(shards, 4, state)(15)
    assert_same(first + second + third, reference)
    visits = list(itertools.chain(*indices(first + second + third)))
    # Batches of 4 go over the end of an epoch of 23.
    for epoch in range(4):
        assert sorted(visits[23 * epoch : 23 * (epoch + 1)]) == list(range(23))


def test_resuming_with_other_numbers_of_workers(shards: Path):
    options = {"image_size": 8, "batch_size": 4, "seed": 5, "text": number_of}
    expected = take(make_loader(shards, **options), 5)[2:]
    loader = make_loader(shards, **options, workers=2)
    take(loader, 2)
    again = make_loader(shards, **options)
    again.set_state(loader.get_state())
    loader.set_state({"next_index": 2})
    assert_same(take(again, 3), expected)
    assert_same(take(loader, 3), expected)
    loader.close()


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


def test_orbax_restores_what_another_number_of_processes_saved(shards: Path, tmp_path: Path):
    def make():
        return make_loader(shards, image_size=8, batch_size=4, seed=5, text=number_of)

    expected = take(make(), 9)[7:]
    for process in range(2):
        (tmp_path / f"process_{process}-of-2.json").write_text('{"next_index": 7}')
    loader = make()

    async def load():
        await (await loader.load(tmp_path))

    asyncio.run(load())
    assert_same(take(loader, 2), expected)


@pytest.mark.parametrize("options", [{}, {"cache": True}, {"tokens": lambda index: {}}])
def test_labels_are_places_among_the_sorted_categories(shards: Path, options: dict):
    for batch in take(make_loader(shards, image_size=8, batch_size=4, **options), 12):
        assert batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["label"], batch["index"] % 2)


def test_labels_of_several_folders_and_of_one_without(shards: Path, tmp_path: Path):
    entries = {"x": {"category": "birds", "prompt": "a bird"}}
    (tmp_path / "in" / "birds").mkdir(parents=True)
    (tmp_path / "in" / "birds" / "x.png").write_bytes(encode(np.zeros((8, 8, 3), np.uint8)))
    (tmp_path / "in" / "meta_data.json").write_text(json.dumps(entries))
    out = tmp_path / "out"
    write_shards(tmp_path / "in", out)
    both = RecordSource([out, shards])
    assert both.categories == ("animals", "birds", "food")
    assert [both[index]["label"] for index in (0, 1, 2)] == [1, 0, 2]
    about = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps({key: about[key] for key in about if key != "categories"}))
    assert RecordSource([out, shards]).categories == ()
    assert "label" not in next(make_loader([out, shards], image_size=8, batch_size=4))


@pytest.fixture(scope="module")
def more_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second folder, of 9 images."""
    root = tmp_path_factory.mktemp("more")
    write_shards(make_folder(root / "more", count=9, side=8), root / "out")
    return root / "out"


def test_folders_without_weights_are_shuffled_together(shards: Path, more_shards: Path):
    batches = take(make_loader([shards, more_shards], image_size=8, batch_size=4, seed=3, text=number_of), 16)
    visits = list(itertools.chain(*indices(batches)))
    assert sorted(visits[:32]) == sorted(visits[32:]) == list(range(32))
    assert max(visits[:9]) >= 23 and min(visits[:9]) < 23
    for batch in batches:
        np.testing.assert_array_equal(
            batch["number"], np.where(batch["index"] < 23, batch["index"], batch["index"] - 23)
        )
    captions = load_captions([shards, more_shards])
    assert captions == load_captions(shards)
    assert some_captions([shards, more_shards], 100) == [f"a thing {number}" for number in range(23)]
    few = some_captions([shards, more_shards], 4)
    assert 2 <= len(few) <= 4 and few == some_captions([shards, more_shards], 4) and set(few) <= set(captions)


def test_weighted_folders_have_their_shares_and_epochs_of_their_own(shards: Path, more_shards: Path):
    def visits(seed: int, **share) -> list[int]:
        options = {"image_size": 8, "batch_size": 4, "seed": seed, "weights": (1.0, 3.0)}
        return list(itertools.chain(*indices(take(make_loader([shards, more_shards], **options, **share), 46))))

    both = visits(3)
    small, large = [n for n in both if n >= 23], [n for n in both if n < 23]
    assert (len(large), len(small)) == (46, 138)
    assert sorted(large[:23]) == sorted(large[23:]) == list(range(23))
    for epoch in range(15):
        assert sorted(small[9 * epoch : 9 * epoch + 9]) == list(range(23, 32))
    assert small[:9] != small[9:18]
    assert both == visits(3) != visits(4)
    halves = [np.reshape(visits(3, rows=rows), (46, 2)) for rows in ((0, 1), (2, 3))]
    assert np.hstack(halves).ravel().tolist() == both


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0)])
def test_weights_that_do_not_fit(shards: Path, weights: tuple[float, ...]):
    with pytest.raises(UserError, match=r"weights .* one for each of the 2 folders"):
        make_loader([shards, shards], image_size=8, batch_size=4, weights=weights)


def with_damaged_record(shards: Path, copy: Path) -> Path:
    """A copy in which record 3 cannot be read."""
    shutil.copytree(shards, copy)
    shard = copy / "train-00000-of-00003.array_record"
    data = bytearray(shard.read_bytes())
    data[data.find(b"a thing 3")] ^= 255
    shard.write_bytes(bytes(data))
    return copy


def test_captions_of_damaged_records_are_left_out(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    damaged = without_captions_files(with_damaged_record(shards, tmp_path / "copy"))
    with pytest.raises(UserError, match=r"1 records do not decode, more than max_bad_records=0"):
        load_captions(damaged)
    capsys.readouterr()
    rest = set(load_captions(shards)) - {"a thing 3", "thing number 3", "thing 3, tag"}
    assert load_captions(damaged, max_bad_records=1) == sorted(rest)
    assert "record number 3 of the shards does not decode, its captions are left out" in capsys.readouterr().err


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
    np.testing.assert_allclose(cropped_image(encode(pixels), 4), expected, atol=0.6)


@pytest.mark.parametrize("size", [(256, 256), (256, 271), (512, 256), (250, 250), (131, 140)])
def test_large_jpegs_look_as_if_decoded_whole(size: tuple[int, int]):
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(file, format="JPEG", quality=95)
    with Image.open(file) as whole:
        expected = cropped_image(encode(np.asarray(whole)), 32)
    difference = np.abs(cropped_image(file.getvalue(), 32).astype(int) - expected)
    assert difference.mean() < 1 and difference.max() <= 4


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "P", "16 bits"])
def test_png_of_any_kind_has_the_pixels_that_pillow_reads(kind: str):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    data = bytes(png_encode(pixels.astype(np.uint16) * 257)) if kind == "16 bits" else None
    if data is None:
        file = io.BytesIO()
        Image.fromarray(pixels).convert(kind).save(file, format="PNG")
        data = file.getvalue()
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(cropped_image(data, 20), image.convert("RGB"))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-40] + bytes(40)])
def test_damaged_png(damage):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    with pytest.raises(UserError, match="does not decode"):
        cropped_image(damage(encode(pixels)), 20)


def test_the_centre_square_is_kept():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert (cropped_image(encode(pixels), 10) == 200).all()
    assert cropped_image(encode(pixels), 7).shape == (7, 7, 3)


def test_transparency_becomes_white():
    pixels = np.zeros((8, 8, 4), np.uint8)
    assert (cropped_image(encode(pixels), 8) == 255).all()
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(file, format="PNG", transparency=(9, 9, 9))
    assert (cropped_image(file.getvalue(), 8) == 255).all()


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


def test_damaged_shard_counts_as_bad_record(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = with_damaged_record(shards, tmp_path / "copy")
    visits = list(itertools.chain(*indices(take(make_loader(copy, image_size=8, batch_size=1), 23))))
    assert sorted(visits) == [0, 1, 2, *(4, 4), *range(5, 23)]
    assert "record number 3 of the shards does not decode" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 0},
        {"batch_size": 24},
        {"workers": 1, "cache": True},
        {"epochs": 0},
    ],
)
def test_bad_arguments(shards: Path, options: dict):
    with pytest.raises(UserError, match=next(iter(options))):
        make_loader(shards, **{"image_size": 8, "batch_size": 4, **options})


def test_damaged_shard_while_reading_is_a_user_error(shards: Path, tmp_path: Path):
    copy = with_damaged_record(shards, tmp_path / "copy")
    with pytest.raises(UserError, match=r"train-00000-of-00003\.array_record is damaged"):
        list(make_loader(copy, image_size=8, batch_size=4, train=False))


def test_looking_ahead_prepares_once_and_keeps_the_position_and_the_error():
    source = grain.MapDataset.source([{"index": np.int32(number)} for number in range(4)])
    prepared = []

    def prepare(batch):
        prepared.append(int(batch["index"][0]))
        if batch["index"][0] == 2:
            raise UserError("this batch is bad")
        return batch

    def make() -> Batches:
        batches = Batches(source.batch(1), workers=0)
        batches.prepare = prepare
        return batches

    batches = make()
    assert next(batches)["index"] == 0
    for _ in range(2):
        batches.look_ahead()
    assert prepared == [0, 1] and batches.get_state() == {"next_index": 1}
    resumed = make()
    resumed.set_state(batches.get_state())
    assert next(resumed)["index"] == next(batches)["index"] == 1
    # Found while looking ahead, said when it is due.
    batches.look_ahead()
    with pytest.raises(UserError, match="this batch is bad"):
        next(batches)
    batches.set_state({"next_index": 3})
    assert [int(batch["index"][0]) for batch in batches] == [3]
