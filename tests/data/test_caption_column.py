"""Captions are read without the images, by start-up and by workers; what is missing or damaged is named."""

import json
import pickle
import shutil
from pathlib import Path

import grain
import msgpack
import numpy as np
import pytest

from hart_jax.data import pipeline
from hart_jax.data.caption_column import CaptionColumn, Captioned, caption_line
from hart_jax.data.mjhq import read_folder
from hart_jax.data.pipeline import TokenSource, load_captions, make_loader
from hart_jax.data.precomputed import PrecomputedTexts
from hart_jax.data.shards import RecordSource, open_shards, verify, write_shards
from hart_jax.errors import UserError
from tests.data.conftest import make_folder, without_captions_files


def token_of(index: int) -> dict[str, np.ndarray]:
    return {"token": np.int32(index)}


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.fixture
def read_records(monkeypatch) -> list[int]:
    """The numbers of all records that are read while a test runs."""
    source, numbers = grain.sources.ArrayRecordDataSource, list[int]()
    read = source.__getitem__
    monkeypatch.setattr(source, "__getitem__", lambda self, index: (numbers.append(index), read(self, index))[1])
    return numbers


def test_start_up_reads_no_image(shards: Path, read_records: list[int]):
    captions = load_captions([shards, shards])
    assert len(captions) == 3 * 23
    source = pickle.loads(pickle.dumps(TokenSource([shards, shards], token_of)))
    pickle.loads(pickle.dumps(PrecomputedTexts(shards)))
    loader = make_loader(shards, image_size=8, batch_size=4, tokens=token_of)
    assert next(loader)["token"].shape == (4,)
    item = source[23 + 4]
    assert item["captions"] == ["a thing 4", "thing number 4", "thing 4, tag"]
    assert (item["label"], item["token"], item["index"]) == (0, 27, 27)
    assert read_records == []


def test_workers_do_not_carry_the_captions(tmp_path: Path):
    """Nor does a process: what it keeps does not grow with them."""
    sizes = []
    for words in (1, 200):
        folder = make_folder(tmp_path / f"{words}" / "train", count=8, side=8)
        entries = json.loads((folder / "meta_data.json").read_text())
        for entry in entries.values():
            entry["captions"] = [caption + " word" * words for caption in entry["captions"]]
        (folder / "meta_data.json").write_text(json.dumps(entries))
        write_shards(folder, folder.parent / "out")
        source = TokenSource(folder.parent / "out", token_of)
        assert source[7]["captions"][-1].endswith("word")
        sizes.append(len(pickle.dumps((source, PrecomputedTexts(folder.parent / "out")))))
    assert abs(sizes[0] - sizes[1]) < 20


def test_shards_of_an_earlier_version_are_read_once(copy: Path, read_records: list[int], capsys):
    expected = load_captions(copy)
    old = without_captions_files(copy)
    assert verify(old) == 3
    source = TokenSource(old, token_of)
    assert "shards without captions files, so that all their records are read" in capsys.readouterr().err
    again = pickle.loads(pickle.dumps(source))
    assert [again[index]["captions"][0] for index in range(23)] == [f"a thing {index}" for index in range(23)]
    assert sorted(read_records) == list(range(23))
    assert load_captions(old) == expected


def test_lines_hold_any_caption_and_say_what_cannot_be_read(tmp_path: Path):
    captions = ['a "quoted" thing\nof two lines', "\u2028 \x85 \r é 🍎", ""]
    file = tmp_path / "x.captions.jsonl"
    packed = msgpack.packb({"category": "a", "captions": captions, "image": b"\n"})
    file.write_bytes(caption_line(packed) + caption_line(b"\xc1") + caption_line(b"") + caption_line(b"\x01"))
    column = CaptionColumn([file, file], [4, 4])
    assert [column[index] for index in range(8)] == [Captioned("a", captions), None, None, None] * 2


def test_missing_and_damaged_captions_are_named(copy: Path):
    file = copy / "train-00001-of-00003.captions.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"thing", b"THING", 1))
    with pytest.raises(UserError, match=r"train-00001-of-00003\.captions\.jsonl does not match"):
        verify(copy)
    file.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"captions .*captions\.jsonl is truncated"):
        open_shards(copy)
    file.write_bytes(whole.replace(b"\n", b" ", 1))
    with pytest.raises(UserError, match=r"captions .* are missing or damaged"):
        load_captions(copy)
    file.write_bytes(b"[" + whole[1:])
    with pytest.raises(UserError, match=r"captions .* are missing or damaged"):
        load_captions(copy)
    file.unlink()
    with pytest.raises(UserError, match=r"captions .*captions\.jsonl is missing"):
        open_shards(copy)


def test_captions_are_those_of_the_source(folder: Path, tmp_path: Path):
    write_shards(folder, tmp_path / "out", records_per_shard=5)
    column = RecordSource(tmp_path / "out").captions
    expected = [Captioned(example.category, list(example.captions)) for example in read_folder(folder)]
    assert [column[index] for index in range(len(column))] == expected


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_read(shards: Path, monkeypatch, read_records):
    monkeypatch.setattr(pipeline, "available_bytes", lambda: 23 * 8 * 8 * 3 - 1)
    with pytest.raises(UserError, match=r"data\.cache=True keeps 23 images of 8 px, 0\.0 GiB, .* data\.cache=False"):
        make_loader(shards, image_size=8, batch_size=4, cache=True)
    make_loader(shards, image_size=8, batch_size=4)
    monkeypatch.setattr(pipeline, "available_bytes", lambda: 23 * 8 * 8 * 3)
    make_loader(shards, image_size=8, batch_size=4, cache=True)
    assert read_records == []
