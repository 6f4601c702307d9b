"""What things are known by: digests of arrays, files and settings, and what two records differ in.

Digests lie on disk, in workdirs, shard folders, runs of sampling and names of cache folders. A number that changes here
disowns what is there.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ABSENT = "(absent)"
_PIECE_BYTES, _CHUNK_BYTES = 2**28, 2**22


def sha256(*parts: str | bytes | np.ndarray) -> str:
    """SHA-256, as 64 hexadecimal digits, of texts (as UTF-8), bytes and arrays (in C order), one after the other."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part if isinstance(part, bytes) else _bytes_of(part))
    return found.hexdigest()


def json_digest(value: Any) -> str:
    """`sha256` of a value as JSON; the order of keys counts."""
    return sha256(json.dumps(value))


def tree_digest(*trees: Mapping[str, Any]) -> str:
    """16 digits of all names, types, shapes and bytes of nested dicts of arrays (about 0.6 s a GiB and core)."""
    named = {f"{number}/{name}": leaf for number, tree in enumerate(trees) for name, leaf in _flat(tree, "/").items()}

    def of_leaf(name: str) -> str:
        array = np.asarray(named[name])
        return sha256(f"{name} {array.dtype} {array.shape}\n", array)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return sha256(" ".join(pool.map(of_leaf, sorted(named))))[:16]


def weights_digest(tree: Mapping[str, Any]) -> str:
    """As `tree_digest` of one tree, but without types: what evaluation's caches and results know weights by."""
    arrays = {name: np.asarray(leaf) for name, leaf in sorted(_flat(tree, "/").items())}
    return sha256(*(part for name, array in arrays.items() for part in (f"{name} {array.shape}\n", array)))[:16]


def sha256sum(path: Path) -> str:
    """`sha256` of a file's content, as the command of this name gives it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """64 digits of a file's content, whose pieces are read side by side (about 0.6 s a GiB and core)."""

    def of_piece(start: int) -> str:
        found, left = hashlib.sha256(), _PIECE_BYTES
        with path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(min(_CHUNK_BYTES, left)):
                found.update(chunk)
                left -= len(chunk)
        return found.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return sha256(" ".join(pool.map(of_piece, range(0, path.stat().st_size, _PIECE_BYTES))))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two nested records of plain values differ in: dotted name -> value there, value here, or `ABSENT`."""
    old, new = _flat(there, "."), _flat(here, ".")
    pairs = {name: (old.get(name, ABSENT), new.get(name, ABSENT)) for name in {**old, **new}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def told(changed: Mapping[str, tuple[Any, Any]], form: str = "{name} is {there!r} there, {here!r} here") -> str:
    """The first few of `differences` in words."""
    named = [form.format(name=name, there=old, here=new) for name, (old, new) in list(changed.items())[:4]]
    return "; ".join(named) + ("; ..." if len(changed) > 4 else "")


def _flat(tree: Mapping[str, Any], separator: str) -> dict[str, Any]:
    # Flax imports JAX, a second that settings and most commands need not wait for.
    from flax.traverse_util import flatten_dict

    return flatten_dict(dict(tree), sep=separator)


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
