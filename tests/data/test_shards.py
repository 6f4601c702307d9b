"""Shards hold the files unchanged, resume, and name what is broken."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
from PIL import Image

from hart_jax.data import precompute
from hart_jax.data import shards as shards_module
from hart_jax.data.mjhq import read_folder
from hart_jax.data.shards import RecordSource, open_shards, verify, write_shards
from hart_jax.errors import UserError
from hart_jax.io.ownership import owned
from tests.data.conftest import file_size_limit, zipped


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
    files = [f"train-{n:05d}-of-00003.{kind}" for n in range(3) for kind in ("array_record", "captions.jsonl")]
    assert [line.split("  ")[1] for line in sums.splitlines()] == files
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"dataset.json", "SHA256SUMS", *files}


def test_interrupted_run_keeps_finished_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, write = tmp_path / "out", shards_module._write_shard
    written = []

    def write_and_stop(path: Path, examples: list, digests: list) -> str:
        if len(written) == 2:
            path.with_name(f".{path.name}.123").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, examples, digests)

    monkeypatch.setattr(shards_module, "_write_shard", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        write_shards(folder, out, records_per_shard=8)
    with pytest.raises(UserError, match="unfinished"):
        open_shards(out)

    # The second finished shard is damaged meanwhile, so two of three are written again.
    (out / written[1]).write_bytes(b"damaged")
    rewritten = []
    monkeypatch.setattr(
        shards_module, "_write_shard", lambda path, *group: (rewritten.append(path.name), write(path, *group))[1]
    )
    write_shards(folder, out, records_per_shard=8)
    assert written[0] not in rewritten and written[1] in rewritten and len(rewritten) == 2
    assert verify(out) == 3
    assert not list(out.glob(".*"))

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


def recolour(folder: Path, number: int):
    path = folder / ("animals", "food")[number % 2] / f"pic{number:03d}.png"
    Image.new("RGB", (32, 32), "white").save(path)


def edit(folder: Path, change: Callable[[dict], None]):
    entries = json.loads((folder / "meta_data.json").read_text())
    change(entries)
    (folder / "meta_data.json").write_text(json.dumps(entries))


def test_a_source_that_has_changed_is_no_longer_what_the_shards_hold(folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    write_shards(folder, out, records_per_shard=8)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    edit(folder, lambda entries: entries.update({"pic001": dict(reversed(entries["pic001"].items()))}))
    assert write_shards(folder, out, records_per_shard=8) == 23

    recolour(folder, 3)
    edit(folder, lambda entries: entries["pic005"].update(prompt="another"))
    edit(folder, lambda entries: entries.update(pic0220=entries.pop("pic022")))
    (folder / "animals" / "pic022.png").rename(folder / "animals" / "pic0220.png")
    message = r"changed: 'pic003', 'pic005'; are new: 'pic0220'; are gone: 'pic022'\)"
    with pytest.raises(UserError, match=message):
        write_shards(folder, out, records_per_shard=8)
    for number in range(0, 12):
        recolour(folder, number)
    with pytest.raises(UserError, match=r"changed: 'pic000', .* 'pic004' and 7 more"):
        write_shards(folder, out, records_per_shard=8)
    (folder / "food" / "pic007.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"other images"):
        write_shards(folder, out, records_per_shard=8)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def interrupted(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves two of three shards."""
    write = shards_module._write_shard

    def stop_at_the_third(path: Path, *group) -> str:
        if "-00002-" in path.name:
            raise KeyboardInterrupt
        return write(path, *group)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards_module, "_write_shard", stop_at_the_third)
        write_shards(folder, out, records_per_shard=8)


def remove_two(folder: Path):
    edit(folder, lambda entries: [entries.pop(f"pic{number:03d}") for number in (4, 5)])


def remove_many(folder: Path):
    edit(folder, lambda entries: [entries.pop(f"pic{number:03d}") for number in range(4, 14)])


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: recolour(folder, 3),
        lambda folder: edit(folder, lambda entries: entries["pic009"].update(prompt="fixed")),
        remove_two,
        remove_many,
    ],
)
def test_an_unfinished_folder_never_mixes_old_and_new(folder: Path, tmp_path: Path, monkeypatch, change):
    interrupted(folder, tmp_path / "out", monkeypatch)
    change(folder)
    write_shards(folder, tmp_path / "out", records_per_shard=8)
    write_shards(folder, tmp_path / "new", records_per_shard=8)
    for path in (tmp_path / "new").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert len(list((tmp_path / "new").iterdir())) == len(list((tmp_path / "out").iterdir()))


def test_an_image_that_changes_between_check_and_writing(folder: Path, tmp_path: Path, monkeypatch):
    write = shards_module._write_shard

    def change_before_the_second(path: Path, *group) -> str:
        if "-00001-" in path.name:
            recolour(folder, 9)
        return write(path, *group)

    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_write_shard", change_before_the_second)
        with pytest.raises(UserError, match=r"pic009\.png has changed since it was checked"):
            write_shards(folder, tmp_path / "out", records_per_shard=8)
    write_shards(folder, tmp_path / "out", records_per_shard=8)
    write_shards(folder, tmp_path / "new", records_per_shard=8)
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (tmp_path / "new" / "SHA256SUMS").read_bytes()


def test_a_full_disk_is_one_error_and_leaves_nothing_broken(folder: Path, tmp_path: Path):
    write_shards(folder, tmp_path / "whole", records_per_shard=8)
    size = max(path.stat().st_size for path in (tmp_path / "whole").glob("*.array_record"))
    with file_size_limit(size - 1), pytest.raises(UserError, match=r"array_record cannot be written .*File too large"):
        write_shards(folder, tmp_path / "out", records_per_shard=8)
    assert not list((tmp_path / "out").glob(".*"))
    write_shards(folder, tmp_path / "out", records_per_shard=8)
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (tmp_path / "whole" / "SHA256SUMS").read_bytes()


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


@pytest.mark.parametrize(
    "change",
    [
        {"count": "23"},
        {"count": -1},
        {"shards": 5},
        {"shards": [{"file": "x"}]},
        {"shards": [["x", 1, 2]]},
        {"shards": [{"file": "../out/x", "count": 1, "bytes": 1}]},
        {"shards": [{"file": "/etc/passwd", "count": 1, "bytes": 1}]},
        {"shards": [{"file": "x", "count": True, "bytes": 1.5}]},
        {"precomputed": [1]},
        {"categories": "animals"},
    ],
)
def test_a_listing_of_another_shape(copy: Path, change: dict):
    about = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        RecordSource(copy)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": NaN}', "[" * 100_000])
@pytest.mark.parametrize("name", ["dataset.json", "unfinished.json"])
def test_a_listing_that_is_no_json(folder: Path, copy: Path, text: str, name: str):
    (copy / "dataset.json").unlink()
    (copy / name).write_text(text)
    with pytest.raises(UserError, match=name):
        write_shards(folder, copy, records_per_shard=8)


@pytest.mark.parametrize(
    "change",
    [{"category": "birds"}, {"image": "text"}, {"captions": "text"}, {"id": None}],
)
def test_a_record_of_another_shape(copy: Path, change: dict):
    shard = copy / "train-00001-of-00003.array_record"
    source = RecordSource(copy)
    records = [{name: value for name, value in source[index].items() if name != "label"} for index in range(8, 16)]
    shards_module.write_records(shard, [msgpack.packb({**record, **change}) for record in records])
    about = json.loads((copy / "dataset.json").read_text())
    about["shards"][1] |= {
        "bytes": shard.stat().st_size,
        "captions_bytes": shard.with_suffix(".captions.jsonl").stat().st_size,
    }
    (copy / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record is damaged"):
        RecordSource(copy)[8]
    assert RecordSource(copy)[0]["id"] == "pic000"


def test_two_runs_do_not_write_the_same_folder(folder: Path, tmp_path: Path):
    with owned(tmp_path / "out", "another run"):
        for write in (write_shards, lambda source, out: precompute.precompute(tmp_path / "done", out, [])):
            write_shards(folder, tmp_path / "done")
            with pytest.raises(UserError, match=r"out: belongs to another run on host"):
                write(folder, tmp_path / "out")
