"""Sets of images: what each kind of folder gives, digests of content, parts that are kept."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hart_jax.data.shards import verify, write_shards
from hart_jax.errors import UserError
from hart_jax.evaluation.feature_cache import DataParallel, compute_features
from hart_jax.evaluation.images import Relabelled, Subset, decode, open_images, random_subset
from hart_jax.io.images import save_png

EMOJI = Path(__file__).parents[1] / "emoji"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "emoji"
    write_shards(EMOJI, folder)
    return folder


def image_files(folder: Path, count: int, side: int = 6) -> Path:
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("cats" if number % 2 else "dogs") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(path)
    return folder


def test_shards_folders_and_zips_give_the_same_images(tmp_path, shards):
    for category in (path for path in EMOJI.iterdir() if path.is_dir()):
        with zipfile.ZipFile(tmp_path / "images.zip", "a") as archive:
            for file in category.iterdir():
                archive.write(file, f"all/{category.name}/{file.name}")
    shutil.copy(EMOJI / "meta_data.json", tmp_path)
    sets = [open_images(path) for path in (shards, EMOJI, tmp_path)]
    entries = json.loads((EMOJI / "meta_data.json").read_text())
    for image_set in sets:
        assert [info.name for info in image_set.infos] == sorted(entries)
        for index, info in enumerate(image_set.infos):
            entry = entries[info.name]
            assert (info.prompt, info.category) == (entry["prompt"], entry["category"])
            assert info.value("style") == entry["style"] and info.value("category") == entry["category"]
            assert info.value("colour") == ""
            assert image_set.read(index) == (EMOJI / info.category / f"{info.name}.png").read_bytes()


def test_any_folder_of_images_has_its_folders_as_categories(tmp_path):
    image_set = open_images(image_files(tmp_path, 4))
    assert [info.name for info in image_set.infos] == ["cats/001.png", "cats/003.png", "dogs/000.png", "dogs/002.png"]
    assert [info.category for info in image_set.infos] == ["cats", "cats", "dogs", "dogs"]


def test_a_digest_is_of_the_content_wherever_it_lies(tmp_path):
    first = open_images(image_files(tmp_path / "a", 4))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert open_images(tmp_path / "b").digest == first.digest
    pixels = np.asarray(Image.open(tmp_path / "b/dogs/002.png")).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(tmp_path / "b/dogs/002.png")
    digests = {open_images(tmp_path / "b").digest, Subset(first, [0, 1]).digest, Subset(first, [1, 0]).digest}
    assert len(digests | {first.digest}) == 4


def test_samples_are_counted_without_their_grid_and_hidden_files(tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    for name in (".trash/x.png", "00000-a-dog.png", ".00001-a-cat.png", "mine/00000-grid.png"):
        save_png(tmp_path / name, image)
    save_png(tmp_path / "00000-grid.png", image, {"software": "hart_jax", "prompts": '["a dog"]'})
    save_png(tmp_path / "00007-grid.png", image, {"software": "hart_jax", "prompt": "grid"})
    found = [info.name for info in open_images(tmp_path).infos]
    assert found == ["00000-a-dog.png", "00007-grid.png", "mine/00000-grid.png"]


def test_choice_depends_on_the_seed_alone():
    assert random_subset(10, 0).tolist() == list(range(10))
    chosen = random_subset(10, 4, seed=3)
    assert (
        chosen.tolist()
        == sorted(set(chosen.tolist()))
        == random_subset(10, 4, seed=3).tolist()
        != random_subset(10, 4).tolist()
    )
    with pytest.raises(UserError, match="--count=11: there are only 10"):
        random_subset(10, 11)


def test_images_are_squares_or_as_they_are(tmp_path):
    tall = np.zeros((8, 4, 3), np.uint8)
    tall[2:6] = 255
    Image.fromarray(tall).save(tmp_path / "tall.png")
    data = (tmp_path / "tall.png").read_bytes()
    assert (decode(data, 4, "tall") == 255).all()
    np.testing.assert_array_equal(decode(data, 0, "tall"), tall)
    Image.new("RGBA", (3, 3), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (decode((tmp_path / "clear.png").read_bytes(), 0, "clear") == 255).all()
    for size in (0, 4):
        with pytest.raises(UserError, match="image torn: does not decode"):
            decode(data[:40], size, "torn")


def test_an_image_of_a_zip_file_that_cannot_be_read_is_named(tmp_path):
    file = next(path for path in sorted(EMOJI.glob("*/*.png")))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(file, f"{file.parent.name}/{file.name}")
    entry = {"category": file.parent.name, "prompt": "a thing"}
    (tmp_path / "meta_data.json").write_text(json.dumps({file.stem: entry}))
    data = bytearray((tmp_path / "images.zip").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "images.zip").write_bytes(data)
    image_set = open_images(tmp_path)
    with pytest.raises(UserError, match=rf"images\.zip/.*{file.name} cannot be read \(Bad CRC-32"):
        compute_features(image_set, 0, mean_colour(), tmp_path / "kept")


def test_a_zip_file_is_opened_once_for_all_its_images(tmp_path, monkeypatch):
    entries = {}
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted(EMOJI.glob("*/*.png"))[:5]:
            archive.write(file, f"{file.parent.name}/{file.name}")
            entries[file.stem] = {"category": file.parent.name, "prompt": "a thing"}
    (tmp_path / "meta_data.json").write_text(json.dumps(entries))
    opened, open_zip = [], zipfile.ZipFile.__init__
    monkeypatch.setattr(
        zipfile.ZipFile, "__init__", lambda self, *given, **more: opened.append(given) or open_zip(self, *given, **more)
    )
    image_set = open_images(tmp_path)
    assert [len(image_set.read(index)) > 0 for index in range(5)] == [True] * 5 and len(opened) == 1


def test_shards_without_their_checksums_are_refused(tmp_path, shards):
    shutil.copytree(shards, tmp_path / "copy")
    (tmp_path / "copy" / "SHA256SUMS").unlink()
    for function in (open_images, verify):
        with pytest.raises(UserError, match="copy needs SHA256SUMS"):
            function(tmp_path / "copy")


@pytest.mark.parametrize("content", [None, "empty", "file"])
def test_what_holds_no_images_is_refused(tmp_path, content):
    path = tmp_path / "x"
    if content == "empty":
        path.mkdir()
    elif content == "file":
        path.write_text("")
    with pytest.raises(UserError, match="holds no images" if content == "empty" else "no such folder"):
        open_images(path)


def mean_colour() -> DataParallel:
    return DataParallel("means", lambda params, images: {"mean": params * jnp.mean(images, axis=(1, 2))}, np.float32(1))


def test_rows_do_not_depend_on_batches_parts_or_interruptions(tmp_path, monkeypatch):
    monkeypatch.setattr("hart_jax.evaluation.feature_cache.CHUNK", 4)
    image_set = open_images(image_files(tmp_path / "images", 11))
    expected = np.stack([decode(image_set.read(index), 0, "").mean(axis=(0, 1)) for index in range(11)])
    for batch_size in (1, 3, 32):
        rows = compute_features(image_set, 0, mean_colour(), tmp_path / f"kept{batch_size}", batch_size=batch_size)
        np.testing.assert_array_equal(rows.places_N, np.arange(11))
        np.testing.assert_allclose(rows.columns["mean"], expected, rtol=1e-6)
    # What is kept is not computed again, what is missing is.
    kept = tmp_path / "kept3"
    os.remove(kept / "00000004-4.npz")
    reads: list[int] = []
    watched = Relabelled(image_set, image_set.infos)
    monkeypatch.setattr(watched, "read", lambda index: reads.append(index) or image_set.read(index))
    again = compute_features(watched, 0, mean_colour(), kept, batch_size=3)
    assert set(reads) == {0, 4, 5, 6, 7}
    np.testing.assert_array_equal(
        again.columns["mean"], compute_features(image_set, 0, mean_colour(), kept).columns["mean"]
    )


def test_sizes_that_differ_are_named_and_damaged_parts_computed_again(tmp_path, capsys):
    folder = image_files(tmp_path / "images", 3)
    Image.new("RGB", (7, 5)).save(folder / "other.png")
    image_set = open_images(folder)
    with pytest.raises(UserError, match=r"other\.png and .* differ in size \(7x5 and 6x6\); give --image_size"):
        compute_features(image_set, 0, mean_colour(), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    rows = compute_features(image_set, 4, mean_colour(), tmp_path / "kept")
    assert rows.columns["mean"].shape == (4, 3)
    (part,) = (tmp_path / "kept").iterdir()
    whole = part.read_bytes()
    for damaged in (whole[:50], b""):
        part.write_bytes(damaged)
        again = compute_features(image_set, 4, mean_colour(), tmp_path / "kept")
        np.testing.assert_array_equal(again.columns["mean"], rows.columns["mean"])
        assert "damaged" in capsys.readouterr().err and part.read_bytes() == whole


def test_without_a_folder_nothing_is_kept(tmp_path, capsys):
    image_set = open_images(image_files(tmp_path / "images", 3))
    (tmp_path / "file").write_text("in the way")
    rows = compute_features(image_set, 0, mean_colour(), None)
    other = compute_features(image_set, 0, mean_colour(), tmp_path / "file" / "kept")
    np.testing.assert_array_equal(rows.columns["mean"], other.columns["mean"])
    assert "cannot be written" in capsys.readouterr().err
