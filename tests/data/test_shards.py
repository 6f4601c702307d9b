"""Shards hold the files unchanged, resume, and name what is broken."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hart_jax.data import shards as shards_module
from hart_jax.data.mjhq import read_folder
from hart_jax.data.shards import RecordSource, open_shards, verify, write_shards
from hart_jax.errors import UserError
from tests.data.conftest import zipped


def test_round_trip(folder: Path, tmp_path: Path):
    assert write_shards(folder, tmp_path / "out", records_per_shard=8) == 23
    assert [shard.count for shard in open_shards(tmp_path / "out")] == [8, 8, 7]
    assert open_shards(tmp_path / "out")[2].path.name == "train-00002-of-00003.array_record"
    assert verify(tmp_path / "out") == 3
    source = RecordSource(tmp_path / "out")
    assert len(source) == 23
    for index, example in enumerate(read_folder(folder)):
        record = source[index]
        assert record["image"] == example.path.read_bytes()
        assert (record["id"], record["category"], record["prompt"]) == (example.id, example.category, example.prompt)
        assert record["captions"] == list(example.captions)
    sums = (tmp_path / "out" / "SHA256SUMS").read_text()
    assert [line.split("  ")[1] for line in sums.splitlines()] == [s.path.name for s in open_shards(tmp_path / "out")]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"dataset.json", "SHA256SUMS", *(f"train-{n:05d}-of-00003.array_record" for n in range(3))}


def test_interrupted_run_keeps_finished_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, write = tmp_path / "out", shards_module._write_shard
    written = []

    def write_and_stop(path: Path, examples: list) -> str:
        if len(written) == 2:
            path.with_name(path.name + ".partial").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, examples)

    monkeypatch.setattr(shards_module, "_write_shard", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        write_shards(folder, out, records_per_shard=8)
    with pytest.raises(UserError, match="unfinished"):
        open_shards(out)

    # The second finished shard is damaged meanwhile, so two of three are written again.
    (out / written[1]).write_bytes(b"damaged")
    rewritten = []
    monkeypatch.setattr(
        shards_module, "_write_shard", lambda path, group: (rewritten.append(path.name), write(path, group))[1]
    )
    write_shards(folder, out, records_per_shard=8)
    assert written[0] not in rewritten and written[1] in rewritten and len(rewritten) == 2
    assert verify(out) == 3
    assert not list(out.glob("*.partial"))

    write_shards(folder, out, records_per_shard=8)
    assert len(rewritten) == 2


def test_workers_change_nothing(folder: Path, tmp_path: Path):
    write_shards(folder, tmp_path / "one", records_per_shard=4)
    write_shards(folder, tmp_path / "two", records_per_shard=4, workers=2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_workers_report_an_image_that_does_not_decode(folder: Path, tmp_path: Path):
    (folder / "animals" / "pic004.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"pic004\.png does not decode"):
        write_shards(folder, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_zip_and_folders_give_the_same_shards(folder: Path, tmp_path: Path):
    write_shards(folder, tmp_path / "one", records_per_shard=8)
    zipped(folder, inside="imgs/")
    write_shards(folder, tmp_path / "two", records_per_shard=8)
    assert (tmp_path / "one" / "SHA256SUMS").read_text() == (tmp_path / "two" / "SHA256SUMS").read_text()


@pytest.mark.parametrize(("limit", "kept"), [(0, 23), (4, 22), (3.9, 21), (1, 20)])
def test_long_images_are_left_out(folder: Path, tmp_path: Path, limit: float, kept: int):
    for number, size in ((0, (32, 8)), (1, (10, 41)), (2, (5, 6))):
        path = folder / ("animals", "food")[number % 2] / f"pic{number:03d}.png"
        Image.new("RGB", size).save(path)
    assert write_shards(folder, tmp_path / "out", max_aspect=limit) == kept
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (about["count"], about["left_out"], about["categories"]) == (kept, 23 - kept, ["animals", "food"])
    names = {RecordSource(tmp_path / "out")[index]["id"] for index in range(kept)}
    assert ("pic000" in names, "pic001" in names, "pic002" in names) == (kept >= 22, kept == 23, kept >= 21)


@pytest.mark.parametrize("setting", [{"max_aspect": 0.5}, {"workers": -1}, {"records_per_shard": 0}])
def test_bad_settings(folder: Path, tmp_path: Path, setting: dict):
    with pytest.raises(UserError, match=next(iter(setting))):
        write_shards(folder, tmp_path / "out", **setting)


def test_out_of_another_source_or_with_other_files_is_refused(folder: Path, tmp_path: Path):
    write_shards(folder, tmp_path / "out")
    with pytest.raises(UserError, match="other images or settings"):
        write_shards(folder, tmp_path / "out", records_per_shard=5)
    with pytest.raises(UserError, match="not empty"):
        write_shards(folder, folder)


def test_image_that_does_not_decode_stops_before_anything_is_written(folder: Path, tmp_path: Path):
    bad = folder / "animals" / "pic004.png"
    bad.write_bytes(bad.read_bytes()[:60])
    command = [sys.executable, "-m", "hart_jax.data.shards", "--source", str(folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pic004.png does not decode" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def test_missing_shard(copy: Path):
    (copy / "train-00001-of-00003.array_record").unlink()
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record is missing"):
        open_shards(copy)


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_truncated_shard(copy: Path, keep: int):
    shard = copy / "train-00001-of-00003.array_record"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record is truncated"):
        open_shards(copy)


def test_truncated_shard_of_the_listed_size(copy: Path):
    """A reader that only knows the file must not bring the process down."""
    shard, listing = copy / "train-00001-of-00003.array_record", json.loads((copy / "dataset.json").read_text())
    shard.write_bytes(shard.read_bytes()[:-100])
    listing["shards"][1]["bytes"] -= 100
    (copy / "dataset.json").write_text(json.dumps(listing))
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record is damaged"):
        open_shards(copy)


def test_damaged_record(copy: Path):
    """Flipped bits keep the size: reading the record, or `verify`, tells."""
    shard = copy / "train-00001-of-00003.array_record"
    data = bytearray(shard.read_bytes())
    position = data.find(b"a thing 9")
    assert position > 0
    data[position] ^= 255
    shard.write_bytes(bytes(data))
    source = RecordSource(copy)
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record is damaged"):
        [source[index] for index in range(8, 16)]
    assert source[0]["id"] == "pic000"
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record does not match"):
        verify(copy)


def test_folder_that_is_not_one(tmp_path: Path):
    with pytest.raises(UserError, match="not a shard folder"):
        open_shards(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="damaged"):
        open_shards(tmp_path)
