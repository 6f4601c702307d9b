"""Folders in the layout of MJHQ-30K: `meta_data.json` and `<category>/<id>.png` (or .jpg, .jpeg, .webp).

The images may also be in zip files beside meta_data.json, as MJHQ-30K comes (mjhq30k_imgs.zip); they need no unpacking.
"""

import dataclasses
import functools
import json
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from hart_jax.errors import UserError

CAPTION_FILE = "meta_data.json"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# What an entry says of every image.
_NAMES = ("category", "prompt", "captions")


@dataclasses.dataclass(frozen=True)
class Example:
    """One captioned image file.

    Attributes:
      id: its key in meta_data.json and the stem of its file.
      category: its folder.
      captions: never empty; the first is the prompt.
      attributes: what else the entry says in words, such as a style: other names with text values.
      path: the image file; in a zip file, that one's path and then the one in it.
      archive: the zip file, None where the image is a file of its own.
    """

    id: str
    category: str
    captions: tuple[str, ...]
    path: Path
    archive: Path | None = None
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def read(self) -> bytes:
        """The image file's bytes."""
        if self.archive is None:
            return self.path.read_bytes()
        return _opened(self.archive).read(self.path.relative_to(self.archive).as_posix())

    @property
    def prompt(self) -> str:
        return self.captions[0]


def read_folder(folder: str | Path) -> list[Example]:
    """Reads the captions of a folder and finds its images (without opening them), in the order of their ids.

    An entry of meta_data.json is `{"category": str, "prompt": str}`; `"captions": [str, ...]` may give others; any
    other text is an attribute.

    An image that is not in its category's folder is looked for in the zip files, under any path that ends so.

    Raises:
      UserError: no folder or caption file, an entry without category or prompt, an entry without an image file, or a
        damaged zip file.
    """
    folder = Path(folder)
    entries = _read_captions(folder)
    zipped = functools.cache(lambda: _zipped_images(folder))
    files: dict[str, dict[str, Path]] = defaultdict(dict)
    examples = []
    for name, entry in sorted(entries.items()):
        category, captions = _checked_entry(folder, name, entry)
        attributes = {key: text for key, text in entry.items() if key not in _NAMES and isinstance(text, str)}
        if category not in files:
            paths = sorted((folder / category).glob("*"))
            files[category] = {path.stem: path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES}
        if name in files[category]:
            path, archive = files[category][name], None
        elif (category, name) in zipped():
            archive, member = zipped()[category, name]
            path = archive / member
        else:
            raise UserError(
                f"{folder / category} has no image {name} ({', '.join(IMAGE_SUFFIXES)}), nor has a zip file in "
                f"{folder}, although {CAPTION_FILE} lists it; add the file or remove the entry"
            )
        examples.append(Example(name, category, captions, path, archive, attributes))
    return examples


def _zipped_images(folder: Path) -> dict[tuple[str, str], tuple[Path, str]]:
    """(category, id) -> (zip file, name in it), of the images in the zip files of a folder."""
    images = {}
    for archive in sorted(folder.glob("*.zip")):
        try:
            names = _opened(archive).namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"zip file {archive} cannot be read ({error}); fetch it again") from error
        for name in names:
            path = PurePosixPath(name)
            # Archives made on a Mac hold a second tree of the same names.
            if path.suffix.lower() in IMAGE_SUFFIXES and "__MACOSX" not in path.parts:
                images[path.parent.name, path.stem] = archive, name
    return images


@functools.cache
def _opened(archive: Path) -> zipfile.ZipFile:
    """Kept open: reading the list of 30,000 images for each of them would take hours."""
    return zipfile.ZipFile(archive)


def _read_captions(folder: Path) -> dict:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one with {CAPTION_FILE} and <category>/<id>.png")
    path = folder / CAPTION_FILE
    if not path.is_file():
        raise UserError(f"missing caption file {path}; it maps each id to its category and prompt")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"caption file {path} is not valid JSON: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"caption file {path} must hold one object {{id: {{category, prompt}}}} with at least one id")
    return entries


def _checked_entry(folder: Path, name: str, entry: object) -> tuple[str, tuple[str, ...]]:
    where = f"entry {name!r} of {folder / CAPTION_FILE}"
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object with category and prompt")
    for key in ("category", "prompt"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise UserError(f"{where} has no {key}; give it a non-empty text")
    if Path(entry["category"]).name != entry["category"] or Path(name).name != name:
        raise UserError(f"{where}: id and category must be plain names without folders, got {entry['category']!r}")
    captions = entry.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise UserError(f"{where}: captions must be a list of non-empty texts")
    return entry["category"], tuple(dict.fromkeys([entry["prompt"], *captions]))
