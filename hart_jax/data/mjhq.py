"""Folders in the layout of MJHQ-30K: `meta_data.json` and `<category>/<id>.png` (or .jpg, .jpeg, .webp)."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from hart_jax.errors import UserError

CAPTION_FILE = "meta_data.json"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Example:
    """One captioned image file.

    Attributes:
      id: its key in meta_data.json and the stem of its file.
      category: its folder.
      captions: never empty; the first is the prompt.
      path: the image file.
    """

    id: str
    category: str
    captions: tuple[str, ...]
    path: Path

    @property
    def prompt(self) -> str:
        return self.captions[0]


def read_folder(folder: str | Path) -> list[Example]:
    """Reads the captions of a folder and finds its images (without opening them), in the order of their ids.

    An entry of meta_data.json is `{"category": str, "prompt": str}`; `"captions": [str, ...]` may give alternatives.

    Raises:
      UserError: no folder or caption file, an entry without category or prompt, or an entry without an image file.
    """
    folder = Path(folder)
    entries = _read_captions(folder)
    files: dict[str, dict[str, Path]] = defaultdict(dict)
    examples = []
    for name, entry in sorted(entries.items()):
        category, captions = _checked_entry(folder, name, entry)
        if category not in files:
            paths = sorted((folder / category).glob("*"))
            files[category] = {path.stem: path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES}
        if name not in files[category]:
            raise UserError(
                f"{folder / category} has no image {name} ({', '.join(IMAGE_SUFFIXES)}) although {CAPTION_FILE} lists "
                "it; add the file or remove the entry"
            )
        examples.append(Example(name, category, captions, files[category][name]))
    return examples


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
