"""Shards, models, logs and results in a bucket: an emulator on loopback, the real clients."""

import errno
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hart_jax.data import staging
from hart_jax.data.shards import CHECKSUM_FILE, RecordSource, as_paths, open_shards, verify, write_shards
from hart_jax.errors import UserError
from hart_jax.io import bucket_lock, buckets
from hart_jax.io.buckets import check_bucket, local_copy, upload_folder
from hart_jax.io.files import write_text
from hart_jax.io.images import read_png_metadata, save_png
from hart_jax.io.ownership import owned
from hart_jax.io.paths import as_path
from hart_jax.training.metrics import MetricsWriter, read_metrics
from tests.bucket import BUCKET, Emulator, Threads, emulated_bucket, require_clients
from tests.train_runs import make_shards

require_clients()


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with emulated_bucket() as running:
        yield running


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HART_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def shards(tmp_path_factory, emulator) -> tuple[Path, Path]:
    """The same two shards, 14 images, in a local folder and in the bucket."""
    local, remote = make_shards(tmp_path_factory.mktemp("shards"), 14, seed=0), as_path(f"{BUCKET}/data/train")
    upload_folder(local, remote)
    return local, remote


def test_records_come_from_verified_copies(shards, cache):
    local, remote = shards
    ours, theirs = RecordSource(remote), RecordSource([local])
    assert [ours[index] for index in (13, 0)] == [theirs[index] for index in (13, 0)]
    lines = [line.split("  ") for line in (local / CHECKSUM_FILE).read_text().splitlines()]
    copies = {path.stem for path in (cache / "shards").glob("*.array_record")}
    assert copies == {digest for digest, name in lines if name.endswith(".array_record")} and len(copies) == 2
    assert verify(remote) == 2
    assert [shard.count for shard in open_shards(remote)] == [8, 6]


def test_only_shards_that_are_read_are_copied_and_the_oldest_make_room(shards, cache, monkeypatch, capsys):
    local, remote = shards
    sizes = [shard.bytes for shard in open_shards(local)]
    monkeypatch.setattr(staging, "_limit_bytes", sum(sizes) - 1)
    ours, theirs = RecordSource(remote), RecordSource(local)
    assert "again and again" in capsys.readouterr().err
    folder = cache / "shards"
    for index in (0, 7, 13, 1, 8):
        assert ours[index] == theirs[index]
        assert [path.stat().st_size for path in folder.glob("*.*") if path.name != ".lock"] == [sizes[index // 8]]
    monkeypatch.setattr(staging, "_limit_bytes", min(sizes) - 1)
    with pytest.raises(UserError, match=r"more than data\.stage_gib="):
        RecordSource(remote)[0]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_copy_that_was_cut_is_gone_on_with_and_checked(shards, cache, monkeypatch, damaged):
    local, remote = shards
    shard = open_shards(remote)[0]
    content = (local / shard.path.name).read_bytes()
    (cache / "shards").mkdir(parents=True)
    half = bytes(len(content) // 2) if damaged else content[: len(content) // 2]
    (cache / "shards" / f"{shard.sha256}.partial").write_bytes(half)
    asked, files = [], buckets.file_system()
    read = files.cat_file
    monkeypatch.setattr(
        files, "cat_file", lambda path, start, end: asked.append((start, end)) or read(path, start=start, end=end)
    )
    assert staging.staged(shard, 2**30).read_bytes() == content
    rest = (len(half), len(content))
    assert asked == ([rest, (0, len(content))] if damaged else [rest])


def test_a_shard_that_does_not_match_its_checksum_is_named(shards, tmp_path):
    local, _ = shards
    remote = as_path(f"{BUCKET}/data/damaged")
    upload_folder(local, remote)
    name = open_shards(local)[0].path.name
    (remote / name).write_bytes((local / name).read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"{name} does not match its checksum"):
        RecordSource(remote)[0]
    (remote / name).write_bytes(b"short")
    with pytest.raises(UserError, match=f"{name} is truncated: 5 bytes"):
        RecordSource(remote)
    (remote / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        RecordSource(remote)


def test_shards_are_written_to_a_bucket(shards, tmp_path):
    local, _ = shards
    out = as_path(f"{BUCKET}/data/written")
    assert write_shards(local.parent / "source", os.fspath(out), records_per_shard=8) == 14
    assert write_shards(local.parent / "source", os.fspath(out), records_per_shard=8) == 14
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in local.iterdir()
    }
    assert as_paths(os.fspath(out)) == [out]


def test_models_are_copied_once_and_anew_when_they_change(emulator, cache):
    folder = as_path(f"{BUCKET}/models/a")
    write_text(folder / "config.json", "{}")
    write_text(folder / "part" / "model.safetensors", "weights")
    copy = local_copy(folder)
    assert copy.name == "a" and (copy / "part" / "model.safetensors").read_text() == "weights"
    assert local_copy(f"{BUCKET}/models/a/") == copy
    assert local_copy(f"{BUCKET}/models/a/config.json").read_text() == "{}"
    write_text(folder / "config.json", "[]")
    assert (local_copy(folder) / "config.json").read_text() == "[]"
    with pytest.raises(UserError, match="--checkpoint=gs://bucket/none: there is no such file or folder"):
        local_copy(f"{BUCKET}/none", "--checkpoint")


def test_images_are_written_whole_with_their_metadata(emulator):
    path = as_path(f"{BUCKET}/out/00000-a-dog.png")
    save_png(path, np.zeros((2, 2, 3), np.uint8), {"prompt": "a dog"})
    assert read_png_metadata(path) == {"prompt": "a dog"}
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    with pytest.raises(UserError, match="exists already"):
        save_png(path, np.zeros((2, 2, 3), np.uint8))


def test_a_resumed_log_is_cut_back_to_its_checkpoint(emulator, monkeypatch, tmp_path):
    workdir = as_path(f"{BUCKET}/runs/log")
    with MetricsWriter(workdir) as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"loss": 1.0 / step})
    monkeypatch.setenv("HART_CACHE_DIR", str(tmp_path / "other"))
    with MetricsWriter(workdir, resumed_step=2) as writer:
        writer.scalars(3, {"loss": 0.5})
    assert [(line["step"], line["loss"]) for line in read_metrics(workdir)] == [(1, 1.0), (2, 0.5), (3, 0.5)]


def test_a_bucket_that_is_missing_or_closed_is_one_sentence(emulator, monkeypatch):
    check_bucket(as_path(f"{BUCKET}/runs/new"), "--workdir", write=True)
    assert not as_path(f"{BUCKET}/runs/new").exists()
    with pytest.raises(UserError, match="--workdir=gs://nowhere/run: there is no bucket nowhere"):
        check_bucket(as_path("gs://nowhere/run"), "--workdir", write=True)
    with refusing() as closed:
        monkeypatch.setattr(buckets, "file_system", lambda: closed)
        with pytest.raises(UserError, match=r"--workdir=gs://bucket/run: this account may not .*no access for you"):
            check_bucket(as_path(f"{BUCKET}/run"), "--workdir")
        with pytest.raises(UserError, match="gs://bucket/models: this account may not"):
            local_copy(f"{BUCKET}/models")


@pytest.mark.parametrize(
    "write",
    [
        lambda folder, local: upload_folder(local, folder),
        lambda folder, local: write_text(folder / "note.txt", "hello"),
        lambda folder, local: write_shards(local.parent / "source", folder),
        lambda folder, local: save_png(folder / "x.png", np.zeros((2, 2, 3), np.uint8), {}),
    ],
)
def test_what_goes_to_a_bucket_that_is_missing_is_one_sentence(shards, write):
    with pytest.raises(UserError, match=r"gs://nowhere/out/\S+: there is no bucket nowhere; make it"):
        write(as_path("gs://nowhere/out"), shards[0])


def test_copies_are_made_where_there_are_no_locks(shards, monkeypatch, capsys):
    local, remote = shards

    def flock(*_) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(buckets.fcntl, "flock", flock)
    buckets._warn_without_locks.cache_clear()
    ours, theirs = RecordSource(remote), RecordSource(local)
    assert [ours[index] for index in (0, 13)] == [theirs[index] for index in (0, 13)]
    assert capsys.readouterr().err.count("has no locks") == 1


def test_a_copy_that_makes_room_before_it_is_opened_is_made_again(shards, monkeypatch):
    local, remote = shards
    stage, made = staging.staged, []

    def removed_once(shard, limit):
        made.append(stage(shard, limit))
        if len(made) == 1:
            made[0].unlink()
        return made[-1]

    monkeypatch.setattr(staging, "staged", removed_once)
    assert RecordSource(remote)[0] == RecordSource(local)[0]
    assert len(made) == 2


def test_a_bucket_that_stays_away_is_one_sentence(emulator, monkeypatch):
    monkeypatch.setattr(buckets, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(buckets.time, "sleep", lambda seconds: None)
    asked = []

    def work() -> None:
        asked.append(1)
        raise ConnectionRefusedError("refused")

    with pytest.raises(UserError, match="does not answer"):
        buckets.retried("gs://bucket/x", work)
    with pytest.raises(FileNotFoundError):
        buckets.retried("gs://bucket/x", as_path(f"{BUCKET}/none").read_text)


def test_a_folder_in_the_bucket_has_one_owner(emulator, monkeypatch):
    folder = as_path(f"{BUCKET}/runs/owned")
    file = folder / bucket_lock.OWNER_FILE
    about = bucket_lock.owner("a training run")
    monkeypatch.setattr(bucket_lock, "STALE_SECONDS", 30.0)
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(bucket_lock.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(bucket_lock.time, "sleep", lambda seconds: None)
    with owned(folder, "ours"):
        assert json.loads(file.read_text())["what"] == "ours"
    assert not file.exists()
    # Of a process that has ended here, or of another machine that writes no more.
    for left in ({"process": 2**22 + 1}, {"process": 2**99}, {"host": "another"}):
        file.write_text(json.dumps({**about, **left, "time": 0}))
        with owned(folder, "ours"):
            assert json.loads(file.read_text())["what"] == "ours"
    # One that still writes is alive.
    beats = iter(range(10**6))

    def beat(seconds: float) -> None:
        file.write_text(json.dumps({**about, "host": "another", "time": next(beats)}))

    beat(0)
    monkeypatch.setattr(bucket_lock.time, "sleep", beat)
    with pytest.raises(UserError, match="belongs to a training run on host another"), owned(folder, "ours"):
        pass


class refusing:
    """gcsfs on a server that allows nothing."""

    def __enter__(self):
        import gcsfs

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps({"error": {"code": 403, "message": "no access for you"}}).encode()
                self.send_response(403)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_) -> None:
                pass

        self._server = Threads(("localhost", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        address = f"http://localhost:{self._server.server_port}"
        return gcsfs.GCSFileSystem(endpoint_url=address, token="anon", skip_instance_cache=True)

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
