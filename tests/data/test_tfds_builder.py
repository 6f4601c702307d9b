"""The TFDS data set has the records of the folder, and needs no TensorFlow."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from hart_jax.data.mjhq import read_folder
from hart_jax.data.tfds_builder import build
from hart_jax.errors import UserError
from tests.data.conftest import zipped
from tests.data.test_image_files import KINDS, exif

READ = """
import sys
import tensorflow_datasets as tfds
source = tfds.data_source("captioned_images", split="train", data_dir=sys.argv[1])
record = source[5]
print(len(source), record["image"][0, 0].tolist(), record["prompt"].decode(), record["label"])
print("tensorflow" in sys.modules)
"""


@pytest.mark.parametrize("packed", [False, True])
def test_the_same_records_without_tensorflow(folder: Path, tmp_path: Path, packed: bool):
    if packed:
        zipped(folder)
    out = build(folder, tmp_path / "tfds", records_per_shard=10)
    assert "tensorflow" not in sys.modules
    assert len(list(out.glob("*.array_record-*-of-00003"))) == 3
    options = {"split": "train", "data_dir": str(tmp_path / "tfds")}
    source = tfds.data_source("captioned_images", **options)
    files = tfds.data_source("captioned_images", decoders={"image": tfds.decode.SkipDecoding()}, **options)
    assert len(source) == len(files) == 23
    for index, example in enumerate(read_folder(folder)):
        record = source[index]
        assert files[index]["image"] == example.read()
        np.testing.assert_array_equal(record["image"], np.full((32, 32, 3), (index, 2 * index, 3 * index), np.uint8))
        assert (record["id"].decode(), record["prompt"].decode()) == (example.id, example.prompt)
        assert [caption.decode() for caption in record["captions"]] == list(example.captions)
        assert record["label"] == index % 2
    names = tfds.builder_from_directory(str(out)).info.features["label"].names
    assert names == ["animals", "food"]


def test_a_program_that_only_knows_tfds_reads_it(folder: Path, tmp_path: Path):
    build(folder, tmp_path)
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["23 [5, 10, 15] a thing 5 1", "False"]


def test_images_of_all_kinds_are_what_they_show(tmp_path: Path):
    (tmp_path / "in" / "cat").mkdir(parents=True)
    entries = {}
    for number, (data, _) in enumerate(KINDS.values()):
        (tmp_path / "in" / "cat" / f"{number:02d}.png").write_bytes(data)
        entries[f"{number:02d}"] = {"category": "cat", "prompt": "a thing"}
    turned = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    turned.save(tmp_path / "in" / "cat" / "turned.png", exif=exif(6))
    entries["turned"] = {"category": "cat", "prompt": "a thing"}
    (tmp_path / "in" / "meta_data.json").write_text(json.dumps(entries))
    build(tmp_path / "in", tmp_path / "tfds")
    source = tfds.data_source("captioned_images", split="train", data_dir=str(tmp_path / "tfds"))
    for index, (_, expected) in enumerate(KINDS.values()):
        np.testing.assert_array_equal(source[index]["image"], expected)
    np.testing.assert_array_equal(source[len(KINDS)]["image"], np.rot90(np.asarray(turned), -1))


def test_bad_input_leaves_nothing(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="records_per_shard 0"):
        build(folder, tmp_path / "tfds", records_per_shard=0)
    (folder / "food" / "pic003.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"pic003\.png does not decode"):
        build(folder, tmp_path / "tfds")
    assert not list((tmp_path / "tfds").glob("**/*.array_record*"))
    Image.new("RGB", (8, 8)).save(folder / "food" / "pic003.png")
    out = build(folder, tmp_path / "tfds")
    with pytest.raises(UserError, match="is there already"):
        build(folder, tmp_path / "tfds")
    assert out.is_dir()


def test_without_tfds_the_extra_is_named(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.delitem(sys.modules, "hart_jax.data.tfds_images", raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'hart_jax\[tfds\]'"):
        build(folder, tmp_path / "tfds")
