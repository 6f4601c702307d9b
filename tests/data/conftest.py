"""A tiny captioned folder, as images and as shards."""

import contextlib
import json
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hart_jax.data import shards as shards_module
from hart_jax.data.shards import write_shards

COUNT = 23


def make_folder(folder: Path, count: int = COUNT, side: int = 32) -> Path:
    """A folder in the MJHQ layout whose image number i has the colour (i, 2i, 3i)."""
    entries = {}
    for number in range(count):
        name, category = f"pic{number:03d}", ("animals", "food")[number % 2]
        (folder / category).mkdir(parents=True, exist_ok=True)
        pixels = np.full((side, side, 3), (number, 2 * number, 3 * number), np.uint8)
        Image.fromarray(pixels).save(folder / category / f"{name}.png")
        captions = [f"a thing {number}", f"thing number {number}", f"thing {number}, tag"]
        entries[name] = {"category": category, "prompt": captions[0], "captions": captions}
    (folder / "meta_data.json").write_text(json.dumps(entries))
    return folder


def zipped(folder: Path, inside: str = "") -> Path:
    """Moves the images of a folder into a zip file there, below the path `inside`."""
    with zipfile.ZipFile(folder / "mjhq30k_imgs.zip", "w") as archive:
        for path in sorted(folder.glob("*/*.png")):
            archive.write(path, inside + path.relative_to(folder).as_posix())
            archive.writestr(f"__MACOSX/{path.relative_to(folder).as_posix()}", b"not an image")
            path.unlink()
    return folder


@contextlib.contextmanager
def file_size_limit(limit: int):
    """Files cannot grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "train")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the folder; read only."""
    root = tmp_path_factory.mktemp("shards")
    write_shards(make_folder(root / "train"), root / "out", records_per_shard=8)
    return root / "out"


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 200 images of which numbers 50 and 51, neighbours, do not decode."""
    folder = make_folder(tmp_path_factory.mktemp("corrupted") / "train", count=200, side=8)
    out = folder.parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "decode", lambda example, data: None)
        for number in (50, 51):
            image = folder / ("animals", "food")[number % 2] / f"pic{number:03d}.png"
            image.write_bytes(image.read_bytes()[:50])
        write_shards(folder, out)
    return out


def without_captions_files(shards: Path) -> Path:
    """Makes a shard folder one of an earlier version, which wrote no captions files."""
    for path in shards.glob("*.captions.jsonl"):
        path.unlink()
    about = json.loads((shards / "dataset.json").read_text())
    for shard in about["shards"]:
        del shard["captions_bytes"]
    (shards / "dataset.json").write_text(json.dumps(about))
    sums = (shards / "SHA256SUMS").read_text().splitlines(keepends=True)
    (shards / "SHA256SUMS").write_text("".join(line for line in sums if "captions.jsonl" not in line))
    return shards
