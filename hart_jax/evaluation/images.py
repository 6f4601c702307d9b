"""Sets of images: shards, a captioned folder or zip (MJHQ-30K's layout), or any folder of image files.

A set knows its content by a digest, so that what was computed of it once is found again, wherever it lies.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from hart_jax.checkpoints.class_names import DATASET_FILE
from hart_jax.config.scales import Scale
from hart_jax.data.image_files import cropped_image, rgb_image
from hart_jax.data.mjhq import CAPTION_FILE, IMAGE_SUFFIXES, Example, read_folder
from hart_jax.data.shards import RecordSource, checksums
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.fingerprint import json_digest, sha256
from hart_jax.io.images import read_png_metadata
from hart_jax.io.paths import as_path

# So many files are hashed without a progress bar.
_FEW = 2000


@dataclasses.dataclass(frozen=True)
class ImageInfo:
    """What is known of an image beside its pixels: `prompt` and `category` are empty where they are not known.

    `attributes` are what else its captions' file says in words, such as a style.
    """

    name: str
    prompt: str = ""
    category: str = ""
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def value(self, attribute: str) -> str:
        """Of an attribute, or of "category"; empty where it has none."""
        return self.category if attribute == "category" else self.attributes.get(attribute, "")


class ImageSet(Protocol):
    """Encoded images in an order, what is known of each, and a digest of their content."""

    infos: Sequence[ImageInfo]
    digest: str

    def read(self, index: int) -> bytes:
        """The bytes of an image file."""
        ...


def open_images(path: str | Path) -> ImageSet:
    """The images of shards, of a folder with `meta_data.json`, or of all image files in a folder and below it.

    Hidden files and folders are left out, and so are the grids that `sample.py` puts beside its samples.

    Raises:
      UserError: nothing there, no images in it, or what `RecordSource` and `read_folder` say.
    """
    path = as_path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder of images")
    if (path / DATASET_FILE).is_file():
        return _ShardImages(path)
    path = local_copy(path)
    if (path / CAPTION_FILE).is_file():
        return _CaptionedImages(read_folder(path))
    return ImageFiles(sorted(file for file in path.rglob("*") if _is_image(file, path)), path)


def _is_image(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.suffix.lower() in IMAGE_SUFFIXES and not hidden and file.is_file() and not _is_grid(file)


def _is_grid(file: Path) -> bool:
    """Whether it shows all samples of a run of `sample.py`, and is none."""
    if not re.fullmatch(r"[0-9]{5,}-grid\.png", file.name):
        return False
    try:
        metadata = read_png_metadata(file)
    except UserError:
        return False
    return metadata.get("software") == "hart_jax" and not metadata.keys().isdisjoint(("prompts", "labels"))


class _ShardImages(ImageSet):
    def __init__(self, folder: Path):
        self._records = RecordSource(folder)
        self.infos = [self._info(index) for index in range(len(self._records))]
        self.digest = sha256(checksums(folder))[:16]

    def _info(self, index: int) -> ImageInfo:
        record = self._records[index]
        return ImageInfo(record["id"], record["prompt"], record["category"], record.get("attributes", {}))

    def read(self, index: int) -> bytes:
        return self._records[index]["image"]


class _CaptionedImages(ImageSet):
    def __init__(self, examples: Sequence[Example]):
        self._examples = examples
        self.infos = [ImageInfo(one.id, one.prompt, one.category, one.attributes) for one in examples]
        self.digest = _digest([one.archive is None and one.path for one in examples], _checksums(examples))

    def read(self, index: int) -> bytes:
        return self._examples[index].read()


class ImageFiles(ImageSet):
    """Image files, in the order given; without `infos` their category is the folder below `root` that they lie in."""

    def __init__(self, files: Sequence[Path], root: Path, infos: Sequence[ImageInfo] | None = None):
        if not files:
            raise UserError(f"{root}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
        self._files = files
        self.infos = [_file_info(file.relative_to(root)) for file in files] if infos is None else infos
        self.digest = _digest(files, [])

    def read(self, index: int) -> bytes:
        return self._files[index].read_bytes()


def _file_info(file: Path) -> ImageInfo:
    folder = file.parent.as_posix()
    return ImageInfo(file.as_posix(), category="" if folder == "." else folder)


def _checksums(examples: Sequence[Example]) -> list[str]:
    """Of the images in zip files, as the files themselves keep them."""
    zipped = [(one.id, one.member_info()) for one in examples if one.archive is not None]
    return [f"{name} {info.CRC} {info.file_size}" for name, info in zipped]


def _digest(files: Sequence[Path | bool], checksums: Sequence[str]) -> str:
    """Of the files' bytes in their order, and of checksums."""
    paths = [file for file in files if not isinstance(file, bool)]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda file: sha256(file.read_bytes()), paths)
        shown = tqdm(hashes, total=len(paths), desc="hashing", unit="image", disable=len(paths) < _FEW)
        return json_digest([*shown, *checksums])[:16]


class Subset(ImageSet):
    """Some images of a set, in the order given."""

    def __init__(self, image_set: ImageSet, indices: Sequence[int]):
        self._image_set, self._indices = image_set, list(map(int, indices))
        self.infos = [image_set.infos[index] for index in self._indices]
        self.digest = json_digest([image_set.digest, self._indices])[:16]

    def read(self, index: int) -> bytes:
        return self._image_set.read(self._indices[index])


class Relabelled(ImageSet):
    """The same images, of which something else is known."""

    def __init__(self, image_set: ImageSet, infos: Sequence[ImageInfo]):
        self._image_set, self.infos, self.digest = image_set, infos, image_set.digest

    def read(self, index: int) -> bytes:
        return self._image_set.read(index)


def random_subset(count: int, wanted: int, seed: int = 0) -> np.ndarray:
    """Places of `wanted` of `count` images, drawn at random without repeating, ascending; all for 0.

    Raises:
      UserError: there are not so many.
    """
    if wanted > count:
        raise UserError(f"--count={wanted}: there are only {count} images")
    if not wanted:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:wanted])


def decode(data: bytes, size: Scale, name: str) -> np.ndarray:
    """uint8 (H, W, 3): `cropped_image` at `size` px, or with 0 the whole image as it is; transparency is white.

    Raises:
      UserError: it does not decode; the message names the image.
    """
    try:
        return cropped_image(data, size) if size else np.asarray(rgb_image(data), np.uint8)
    except UserError as error:
        problem = str(error).removeprefix("image ")
        raise UserError(f"image {name}: {problem}; fix it or take it out") from error
