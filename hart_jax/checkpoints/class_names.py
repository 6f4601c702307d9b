"""The names of a class-conditional model's classes, in the order of their labels.

Shards carry them as their categories, a workdir and a model folder as a JSON list in a file.
"""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.files import check_readable, read_json, write_json
from hart_jax.io.paths import as_path

CLASSES = "classes.json"
# What a shard folder says of itself, its categories among it.
DATASET_FILE = "dataset.json"


def class_names(folders: Sequence[str | Path]) -> tuple[str, ...]:
    """Those of training shards, as training numbers them; none where a folder is gone or has no categories."""
    files = [as_path(folder) / DATASET_FILE for folder in folders]
    if not files or not all(file.is_file() for file in files):
        return ()
    return merged([read_json(local_copy(file)).get("categories", []) for file in files])


def merged(categories: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Of several folders, sorted; none where one has none."""
    return tuple(sorted(set().union(*categories))) if all(categories) else ()


def read_classes(folder: Path) -> tuple[str, ...]:
    """Those that a folder says; none where it says nothing.

    Raises:
      UserError: its file is damaged.
    """
    path = folder / CLASSES
    if not path.exists():
        return ()
    check_readable(path)
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ValueError("it is not a list of names")
        if len(set(map(normalized, names))) < len(names):
            raise ValueError("a name is there twice")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); write the names of the classes as a JSON list") from None
    return tuple(names)


def write_classes(folder: Path, names: Sequence[str]) -> None:
    """Writes them into a folder, where there are any."""
    if names:
        write_json(folder / CLASSES, list(names), ensure_ascii=False)


def normalized(name: str) -> str:
    """A name as all file systems and editors agree on: composed Unicode."""
    return unicodedata.normalize("NFC", name)
