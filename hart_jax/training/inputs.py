"""What a run is trained on, known by content: a resumed run goes on with the same data, wherever it lies."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from hart_jax.data.shards import CHECKSUM_FILE, checksums
from hart_jax.errors import UserError
from hart_jax.io.files import write_json
from hart_jax.io.fingerprint import sha256
from hart_jax.io.paths import as_path, is_remote
from hart_jax.parallel.agree import gather_texts

INPUTS_FILE = "inputs.json"
# What a digest that is another one now says, by its name.
_CHANGED = {
    "data": "the training shards are not those that the run in {run} was trained on (the digest of their checksums",
    "data.buckets": "images lie in other buckets than when the run in {run} began (the digest of which lies where",
}


def data_digests(data: Mapping[str, Any]) -> dict[str, str]:
    """The digest of the training shards of a config's `data`, by their checksum files, in their order.

    Of a folder that has none, the names and sizes of its files.
    """
    folders: Sequence[str] = data["sources"] or [data["train"]]
    digests = [bytes.fromhex(sha256(_content(as_path(folder)))) for folder in folders]
    return {"data": sha256(*digests)[:16]}


def _content(folder: Path) -> bytes:
    if is_remote(folder) or (folder / CHECKSUM_FILE).exists() or not folder.is_dir():
        return checksums(folder)
    return json.dumps([(path.name, path.stat().st_size) for path in sorted(folder.iterdir())]).encode()


def check_inputs(workdir: Path, digests: Mapping[str, str]) -> None:
    """Compares a resumed run's digests with its own, if it has any. All processes call it; nothing is written.

    Raises:
      UserError: in every process: the data are others, or the file that says so is damaged.
    """
    problem = ""
    if jax.process_index() == 0:
        try:
            _check(workdir / INPUTS_FILE, digests)
        except UserError as error:
            problem = str(error)
    problem = gather_texts(problem)[0]
    if problem:
        raise UserError(problem)


def keep_inputs(workdir: Path, digests: Mapping[str, str]) -> None:
    """Writes the digests into the workdir of a run that is new, or of an older version, which kept none."""
    if jax.process_index() == 0:
        write_json(workdir / INPUTS_FILE, digests, indent=2)


def _check(path: Path, digests: Mapping[str, str]) -> None:
    if not path.exists():
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError("it holds no digests")
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); remove it to go on with the data as they are") from None
    for name, digest in digests.items():
        if known.get(name, digest) != digest:
            raise UserError(
                f"{name}: {_CHANGED[name].format(run=path.parent)} is {digest}, was {known[name]}); give those, or "
                f"another workdir. To go on with these, remove {path}"
            )
