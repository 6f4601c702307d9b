"""The folder layout and its errors."""

import json
from pathlib import Path

import pytest

from hart_jax.data.mjhq import read_folder
from hart_jax.errors import UserError
from tests.data.conftest import zipped


def test_reads_all_examples_in_order(folder: Path):
    examples = read_folder(folder)
    assert [example.id for example in examples] == [f"pic{number:03d}" for number in range(23)]
    assert examples[1].path == folder / "food" / "pic001.png"
    assert examples[1].prompt == "a thing 1"
    assert len(examples[1].captions) == 3


def test_an_entry_needs_only_category_and_prompt(folder: Path):
    entries = json.loads((folder / "meta_data.json").read_text())
    del entries["pic000"]["captions"]
    (folder / "meta_data.json").write_text(json.dumps(entries))
    assert read_folder(folder)[0].captions == ("a thing 0",)


def test_images_in_a_zip_file(folder: Path):
    unpacked = read_folder(folder)
    contents = [example.read() for example in unpacked]
    assert contents[3] == (folder / "food" / "pic003.png").read_bytes()
    packed = read_folder(zipped(folder, inside="mjhq30k_imgs/"))
    assert [example.read() for example in packed] == contents
    assert packed[3].path == folder / "mjhq30k_imgs.zip" / "mjhq30k_imgs" / "food" / "pic003.png"
    assert [e.captions for e in packed] == [e.captions for e in unpacked]


def test_missing_from_the_zip_file_and_damaged_zip_file(folder: Path):
    (folder / "food" / "pic003.png").unlink()
    zipped(folder)
    with pytest.raises(UserError, match="has no image pic003"):
        read_folder(folder)
    (folder / "more.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"zip file .*more\.zip cannot be read"):
        read_folder(folder)


def test_missing_folder_and_caption_file(folder: Path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        read_folder(folder / "nowhere")
    (folder / "meta_data.json").unlink()
    with pytest.raises(UserError, match=r"missing caption file .*meta_data\.json"):
        read_folder(folder)


def test_missing_image(folder: Path):
    (folder / "food" / "pic003.png").unlink()
    with pytest.raises(UserError, match="has no image pic003"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"category": "food"}, "'pic001' .* has no prompt"),
        ({"category": "food", "prompt": " "}, "'pic001' .* has no prompt"),
        ({"prompt": "x"}, "'pic001' .* has no category"),
        ({"category": "../food", "prompt": "x"}, "plain names"),
        ({"category": "food", "prompt": "x", "captions": "y"}, "list of non-empty texts"),
        ("x", "must be an object"),
    ],
)
def test_bad_entry(folder: Path, entry: object, message: str):
    entries = json.loads((folder / "meta_data.json").read_text())
    entries["pic001"] = entry
    (folder / "meta_data.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=message):
        read_folder(folder)


def test_bad_json(folder: Path):
    (folder / "meta_data.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_folder(folder)
