"""The folder layout and its errors."""

import json
import unicodedata
import zipfile
from pathlib import Path

import pytest

from hart_jax.data import mjhq
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
        ({"category": "..", "prompt": "x"}, r"plain names .* got '\.\.'"),
        ({"category": "a\0b", "prompt": "x"}, "plain names"),
        ({"category": "food" * 100, "prompt": "x"}, "File name too long"),
        ({"category": "food", "prompt": "a dog \ud83d"}, "'pic001' .* not Unicode"),
        ({"category": "food", "prompt": "x", "captions": ["y", "\udc00"]}, "'pic001' .* not Unicode"),
        ({"category": "food", "prompt": "x", "style": "\ud83d"}, "'pic001' .* not Unicode"),
        ({"category": "food", "prompt": "x", "more": [{"\ud83d": 1}]}, "'pic001' .* not Unicode"),
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


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 100_000])
def test_bad_json(folder: Path, text: bytes):
    (folder / "meta_data.json").write_bytes(text)
    with pytest.raises(UserError, match="not valid JSON"):
        read_folder(folder)


def test_a_name_that_comes_twice(folder: Path):
    for text, name in (('{"a": {}, "b": {}, "a": {}}', "a"), ('{"a": {"prompt": "x", "prompt": "y"}}', "prompt")):
        (folder / "meta_data.json").write_text(text)
        with pytest.raises(UserError, match=f"meta_data.json has '{name}' twice"):
            read_folder(folder)


def test_an_image_that_is_there_twice(folder: Path):
    other = folder / "food" / "pic003.webp"
    other.write_bytes(b"")
    with pytest.raises(UserError, match=r"'pic003' .* more than once: .*pic003\.png and .*pic003\.webp"):
        read_folder(folder)
    other.unlink()
    # What no entry asks for may be there as often as it likes.
    (folder / "food" / "more.webp").write_bytes(b"")
    (folder / "food" / "more.png").write_bytes(b"")
    assert len(read_folder(folder)) == 23
    with zipfile.ZipFile(zipped(folder) / "more.zip", "w") as archive:
        archive.writestr("again/food/pic003.jpg", b"")
    with pytest.raises(UserError, match=r"'pic003' .*mjhq30k_imgs\.zip/food/pic003\.png and .*more\.zip/again"):
        read_folder(folder)


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("packed", [False, True])
def test_names_in_another_unicode_form_are_found(folder: Path, listed: str, stored: str, packed: bool):
    """A Mac writes é as two characters into the names of files, where a caption file has one."""
    category, name = "pâté", "café"
    place = folder / unicodedata.normalize(stored, category) / unicodedata.normalize(stored, f"{name}.png")
    place.parent.mkdir()
    place.write_bytes(b"an image")
    entries = json.loads((folder / "meta_data.json").read_text())
    category, name = (unicodedata.normalize(listed, text) for text in (category, name))
    entries[name] = {"category": category, "prompt": "a café"}
    (folder / "meta_data.json").write_text(json.dumps(entries))
    (example,) = (one for one in read_folder(zipped(folder) if packed else folder) if one.id == name)
    assert (example.read(), example.category) == (b"an image", category)


def test_names_that_differ_in_their_unicode_form_alone_are_told_apart(folder: Path):
    entries = json.loads((folder / "meta_data.json").read_text())
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "café")
        entries[name] = {"category": "food", "prompt": "a café"}
        (folder / "food" / f"{name}.png").write_bytes(form.encode())
    (folder / "meta_data.json").write_text(json.dumps(entries))
    found = {example.id: example.read().decode() for example in read_folder(folder) if "caf" in example.id}
    assert found == {unicodedata.normalize(form, "café"): form for form in ("NFC", "NFD")}


@pytest.mark.parametrize("name", ["/food/pic003.png", "./food/pic003.png", "../../food/pic003.png"])
def test_odd_names_in_a_zip_file_stay_in_it(folder: Path, name: str):
    path = folder / "food" / "pic003.png"
    data = path.read_bytes()
    path.unlink()
    with zipfile.ZipFile(folder / "odd.zip", "w") as archive:
        archive.writestr(name, data)
    assert read_folder(folder)[3].read() == data


def test_images_that_are_too_large_or_cannot_be_read_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    example = read_folder(folder)[3]
    monkeypatch.setattr(mjhq, "MAX_IMAGE_BYTES", 60)
    with pytest.raises(UserError, match=r"pic003\.png has \d+ bytes, more than 60"):
        example.read()
    example.path.unlink()
    with pytest.raises(UserError, match=r"pic003\.png cannot be read .*No such file"):
        example.read()
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("food/pic003.png", bytes(100_000))
    with pytest.raises(UserError, match=r"bomb\.zip/food/pic003\.png has 100000 bytes"):
        read_folder(folder)[3].read()
