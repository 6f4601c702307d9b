"""Folders in the layout of MJHQ-30K: `meta_data.json` and `<category>/<id>.png` (or .jpg, .jpeg, .webp).

The images may also be in zip files beside meta_data.json, as MJHQ-30K comes (mjhq30k_imgs.zip); they need no unpacking.
"""

import dataclasses
import functools
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from hart_jax.checkpoints.class_names import normalized
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy

CAPTION_FILE = "meta_data.json"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# What an entry says of every image.
_NAMES = ("category", "prompt", "captions")
# Of one image file: far above any photograph, and below what would fill the memory.
MAX_IMAGE_BYTES = 1 << 30


# An image's path, and the zip file and the name in it where it is in one.
_Place = tuple[Path, Path | None, str]


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
      member: the image's name in the zip file.
    """

    id: str
    category: str
    captions: tuple[str, ...]
    path: Path
    archive: Path | None = None
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    member: str = ""

    def read(self) -> bytes:
        """The image file's bytes.

        Raises:
          UserError: it cannot be read, or has more than `MAX_IMAGE_BYTES`.
        """
        try:
            # Of a zip file's member no more is unpacked than it says here.
            size = self.path.stat().st_size if self.archive is None else self.member_info().file_size
            if size > MAX_IMAGE_BYTES:
                raise UserError(f"image {self.path} has {size} bytes, more than {MAX_IMAGE_BYTES}; make it smaller")
            return self.path.read_bytes() if self.archive is None else _opened(self.archive).read(self.member)
        except UserError:
            raise
        except Exception as error:  # zip files raise all kinds
            problem = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"image {self.path} cannot be read ({problem}); fetch or copy it again") from error

    def member_info(self) -> zipfile.ZipInfo:
        """What its zip file says of an image."""
        assert self.archive is not None
        return _opened(self.archive).getinfo(self.member)

    @property
    def prompt(self) -> str:
        return self.captions[0]


def read_folder(folder: str | Path) -> list[Example]:
    """Reads the captions of a folder and finds its images (without opening them), in the order of their ids.

    An entry of meta_data.json is `{"category": str, "prompt": str}`; `"captions": [str, ...]` may give others; any
    other text is an attribute.

    An image that is not in its category's folder is looked for in the zip files, under any path that ends so.

    Raises:
      UserError: no folder or caption file, an id or other name twice, an entry without category or prompt or of texts
        that are not Unicode, an entry without an image file or with two, or a damaged zip file.
    """
    folder = local_copy(folder)
    entries = _read_captions(folder)
    zipped = functools.cache(lambda: _zipped_images(folder))
    files: dict[str, dict[str, list[_Place]]] = {}
    examples = []
    for name, entry in sorted(entries.items()):
        category, captions = _checked_entry(folder, name, entry)
        attributes = {key: text for key, text in entry.items() if key not in _NAMES and isinstance(text, str)}
        if category not in files:
            files[category] = _image_files(_category_folder(folder, category))
        found = files[category].get(normalized(name)) or zipped().get((normalized(category), normalized(name)), [])
        if len(found) > 1:
            # Names that differ in their Unicode form alone are told apart where they can be.
            found = [place for place in found if place[0].stem == name] or found
        if not found:
            raise UserError(
                f"{folder / category} has no image {name} ({', '.join(IMAGE_SUFFIXES)}), nor has a zip file in "
                f"{folder}, although {CAPTION_FILE} lists it; add the file or remove the entry"
            )
        if len(found) > 1:
            raise UserError(
                f"image {name!r} of category {category!r} is there more than once: {found[0][0]} and {found[1][0]}; "
                "remove all but one"
            )
        path, archive, member = found[0]
        examples.append(Example(name, category, captions, path, archive, attributes, member))
    return examples


def _category_folder(folder: Path, category: str) -> Path:
    """Where the category's image files lie: a folder of its name, be it written in another Unicode form."""
    exact = folder / category
    if category.isascii() or exact.is_dir():
        return exact
    return next((path for path in sorted(folder.iterdir()) if normalized(path.name) == normalized(category)), exact)


def _image_files(folder: Path) -> dict[str, list[_Place]]:
    """Stem, normalized -> where the image files of a folder are that have it."""
    found: dict[str, list[_Place]] = {}
    try:
        paths = sorted(folder.glob("*"))
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({error.strerror})") from error
    for path in paths:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            found.setdefault(normalized(path.stem), []).append((path, None, ""))
    return found


def _zipped_images(folder: Path) -> dict[tuple[str, str], list[_Place]]:
    """(category, id), normalized -> where it is, of the images in the zip files of a folder."""
    images: dict[tuple[str, str], list[_Place]] = {}
    for archive in sorted(folder.glob("*.zip")):
        try:
            names = _opened(archive).namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"zip file {archive} cannot be read ({error}); fetch it again") from error
        for name in names:
            path = PurePosixPath(name)
            # Archives made on a Mac hold a second tree of the same names.
            if path.suffix.lower() in IMAGE_SUFFIXES and "__MACOSX" not in path.parts:
                place = archive / name.lstrip("/"), archive, name
                names_of_it = normalized(path.parent.name), normalized(path.stem)
                images.setdefault(names_of_it, []).append(place)
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

    def object_of(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for place, (name, _) in enumerate(pairs) if name in dict(pairs[:place]))
            raise UserError(f"caption file {path} has {twice!r} twice; remove or rename one of them")
        return found

    try:
        entries = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=object_of)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"caption file {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
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
    for plain in (entry["category"], name):
        if Path(plain).name != plain or plain == ".." or "\0" in plain:
            raise UserError(f"{where}: id and category must be plain names without folders, got {plain!r}")
    captions = entry.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise UserError(f"{where}: captions must be a list of non-empty texts")
    for text in _texts([name, entry]):
        if not _is_unicode(text):
            raise UserError(f"{where}: {text!r} is not Unicode text (half of a surrogate pair); fix it")
    return entry["category"], tuple(dict.fromkeys([entry["prompt"], *captions]))


def _texts(value: object) -> Iterator[str]:
    """All texts in a JSON value, names too."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value


def _is_unicode(text: str) -> bool:
    """Whether it has no halves of surrogate pairs, which JSON may write alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
